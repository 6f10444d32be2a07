// The label of one region: a box inside of the viewer's bitmap, with undo. The first axis is the fastest.

const MOST_STEPS = 50;

export class RegionLabel {
  // shape, start and size in voxels of the view.
  constructor({shape, start, size}) {
    Object.assign(this, {shape, start, size});
    this.voxels = new Uint8Array(size[0] * size[1] * size[2]);
    this.past = [];
    this.future = [];
  }

  *rows() {
    const [nx, ny] = this.shape, [ax, ay, az] = this.start, [dx, dy, dz] = this.size;
    for (let z = 0; z < dz; z++) for (let y = 0; y < dy; y++)
      yield [ax + nx * (ay + y + ny * (az + z)), dx * (y + dy * z), dx];
  }

  // Take the region out of a bitmap of the view; true if it changed. Voxels outside of the region are left out.
  read(bitmap) {
    const found = new Uint8Array(this.voxels.length);
    for (const [from, to, n] of this.rows()) found.set(bitmap.subarray(from, from + n), to);
    return this.put(found);
  }

  // Write the region into an otherwise empty bitmap.
  write(bitmap) {
    bitmap.fill(0);
    for (const [to, from, n] of this.rows()) bitmap.set(this.voxels.subarray(from, from + n), to);
  }

  // A new state, which can be undone; true if it differs.
  put(voxels) {
    if (voxels.every((value, i) => value === this.voxels[i])) return false;
    this.past.push(this.voxels);
    if (this.past.length > MOST_STEPS) this.past.shift();
    this.future = [];
    this.voxels = voxels;
    return true;
  }

  undo() { return this.step(this.past, this.future); }
  redo() { return this.step(this.future, this.past); }
  step(from, to) {
    if (!from.length) return false;
    to.push(this.voxels);
    this.voxels = from.pop();
    return true;
  }

  get isEmpty() { return this.voxels.every(value => value === 0); }

  // Index of a voxel of the view; -1 outside of the region.
  at(voxel) {
    const [x, y, z] = voxel.map((v, a) => v - this.start[a]);
    const inside = [x, y, z].every((v, a) => v >= 0 && v < this.size[a]);
    return inside ? x + this.size[0] * (y + this.size[1] * z) : -1;
  }

  // Fill the connected voxels of one value around a voxel with another value, within a plane across `axis`.
  fill(voxel, axis, value) {
    const first = this.at(voxel);
    if (first < 0 || this.voxels[first] === value) return false;
    const steps = [1, this.size[0], this.size[0] * this.size[1]], old = this.voxels[first];
    const found = this.voxels.slice(), open = [first];
    found[first] = value;
    while (open.length) {
      const i = open.pop();
      for (let a = 0; a < 3; a++) {
        if (a === axis) continue;
        const place = Math.floor(i / steps[a]) % this.size[a];
        for (const [other, inside] of [[i - steps[a], place > 0], [i + steps[a], place < this.size[a] - 1]])
          if (inside && found[other] === old) { found[other] = value; open.push(other); }
      }
    }
    return this.put(found);
  }

  // Copy the slice before (or after, at the border) the one through a voxel onto it; empty voxels copy nothing.
  copy(voxel, axis) {
    const place = voxel[axis] - this.start[axis];
    if (place < 0 || place >= this.size[axis] || this.size[axis] < 2) return false;
    const from = place > 0 ? place - 1 : 1;
    const step = [1, this.size[0], this.size[0] * this.size[1]][axis], found = this.voxels.slice();
    for (let i = 0; i < found.length; i++)
      if (Math.floor(i / step) % this.size[axis] === place) {
        const value = this.voxels[i + (from - place) * step];
        if (value) found[i] = value;
      }
    return this.put(found);
  }
}
