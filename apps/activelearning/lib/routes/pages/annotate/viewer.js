// NiiVue with one region: three planes, the rest of the view dimmed, and a label that cannot leave the region.

import {Niivue, NVImage} from "../niivue.js";
import {RegionLabel} from "./label.js";
import {colour} from "./look.js";

const DIM = {R: [0, 0, 0], G: [0, 0, 0], B: [0, 0, 0], A: [0, 255, 255], I: [0, 1, 255]};
export class Viewer {
  // changed() is called after every stroke that changed the label of the region.
  constructor(canvas, frame, changed) {
    this.canvas = canvas;
    this.frame = frame;
    this.changed = changed;
    this.tool = "pen";
    this.value = 1;
    this.label = null;
    this.voxel = null;
    this.axis = 2;
    this.nv = new Niivue({
      backColor: [0, 0, 0, 1], crosshairColor: [0.18, 0.83, 0.75, 0.6], crosshairWidth: 0.2, show3Dcrosshair: false,
      isOrientCube: false, isCornerOrientationText: true, dragAndDropEnabled: false, loadingText: "",
      multiplanarShowRender: 0, isNearestInterpolation: true, maxDrawUndoBitmaps: 1, logLevel: "warn", isResizeCanvas: true,
    });
    // Strokes end anywhere, also outside of the canvas.
    window.addEventListener("pointerup", () => { this.end(); setTimeout(() => this.settle(), 0); });
    this.nv.onLocationChange = place => { this.located(place); this.outline(); };
    new ResizeObserver(() => requestAnimationFrame(() => this.outline())).observe(canvas);
  }

  async attach() {
    await this.nv.attachToCanvas(this.canvas);
    this.nv.addColormap("dim", DIM);
    this.nv.setSliceType(this.nv.sliceTypeMultiplanar);
  }

  // buffer: an uncompressed NIfTI of the view; place: its shape and the region's start and size.
  async open(buffer, place, classes) {
    const nv = this.nv;
    this.close();
    const image = await NVImage.loadFromUrl({url: "region.nii", name: "region.nii", buffer, colormap: "gray"});
    nv.addVolume(image);
    const mask = await NVImage.loadFromUrl({url: "rest.nii", name: "rest.nii", buffer: outside(buffer, place), colormap: "dim",
      opacity: 0.55, cal_min: 0, cal_max: 255});
    nv.addVolume(mask);
    nv.setDrawColormap({R: [0, ...classes.map((_, i) => colour(i)[0])], G: [0, ...classes.map((_, i) => colour(i)[1])],
      B: [0, ...classes.map((_, i) => colour(i)[2])], A: [0, ...classes.map(() => 255)], I: [0, ...classes.map(c => c.value)],
      labels: ["", ...classes.map(c => c.name)], min: 0, max: classes.length});
    nv.createEmptyDrawing();
    this.label = new RegionLabel(place);
    this.range = [image.global_min, image.global_max];
    this.automatic = [image.cal_min, image.cal_max];
    this.jump(place.start.map((a, i) => a + Math.floor(place.size[i] / 2)));
    this.choose(this.tool, this.value);
    this.show();
  }

  close() {
    const nv = this.nv;
    if (nv.drawBitmap) nv.closeDrawing();
    while (nv.volumes.length) nv.removeVolume(nv.volumes[nv.volumes.length - 1]);
    this.label = null;
    this.outline();
    nv.drawScene();
  }

  choose(tool, value) {
    this.tool = tool;
    this.value = value;
    const draws = ["pen", "outline", "erase"].includes(tool) && this.label !== null;
    this.nv.setDrawingEnabled(draws);
    if (draws) this.nv.setPenValue(tool === "erase" ? 0 : value, tool === "outline");
  }

  set brush(size) { this.nv.opts.penSize = size; }
  set opacity(value) { this.nv.setDrawOpacity(value); }

  set window(range) {
    const image = this.nv.volumes[0];
    if (!image) return;
    [image.cal_min, image.cal_max] = range === "full" ? this.range : range || this.automatic;
    this.nv.updateGLVolume();
  }

  // NiiVue draws the lines between places of the pointer without their last voxel.
  end() {
    const last = this.nv.drawPenLocation;
    if (this.label && this.nv.opts.drawingEnabled && !Number.isNaN(last[0])) this.nv.drawPt(...last, this.nv.opts.penValue);
  }

  // Keep what was drawn inside of the region, and nothing else.
  settle() {
    if (!this.label || !this.nv.drawBitmap) return;
    const changed = this.label.read(this.nv.drawBitmap);
    this.show();
    if (changed) this.changed();
  }

  show() {
    this.label.write(this.nv.drawBitmap);
    this.nv.refreshDrawing(true);
  }

  // An edit of the label other than a stroke: undo, fill, copy, a prediction.
  edit(change) {
    if (!this.label || !change(this.label)) return;
    this.show();
    this.changed();
  }

  located(place) {
    this.voxel = place.vox.slice(0, 3).map(Math.round);
    if (place.axCorSag >= 0 && place.axCorSag <= 2) this.axis = [2, 1, 0][place.axCorSag];
    if (this.tool === "fill" && this.pressed) this.edit(label => label.fill(this.voxel, this.axis, this.value));
    this.pressed = false;
  }

  jump(voxel) {
    this.voxel = voxel;
    this.nv.scene.crosshairPos = this.nv.vox2frac(voxel);
    this.nv.drawScene();
    requestAnimationFrame(() => this.outline());
  }

  // The frame of the region in each plane; dashed where the slice shown lies beside it.
  outline() {
    this.frame.replaceChildren();
    if (!this.label) return;
    const {start, size, shape} = this.label, now = this.nv.scene.crosshairPos, dpr = this.nv.uiData.dpr || 1;
    for (const [kind, a, b] of [[0, 0, 1], [1, 0, 2], [2, 1, 2]]) {
      const axis = 3 - a - b;
      const corner = high => {
        const at = Array.from(now);
        for (const k of [a, b]) at[k] = (start[k] + (high ? size[k] : 0)) / shape[k];
        return this.nv.frac2canvasPosWithTile(at, kind)?.pos.map(v => v / dpr);
      };
      const low = corner(false), high = corner(true);
      if (!low || !high) continue;
      const voxel = now[axis] * shape[axis] - start[axis], rect = document.createElementNS("http://www.w3.org/2000/svg", "rect");
      const [x, y] = [Math.min(low[0], high[0]), Math.min(low[1], high[1])];
      for (const [name, value] of Object.entries({x, y, width: Math.abs(high[0] - low[0]), height: Math.abs(high[1] - low[1]),
        class: voxel < 0 || voxel > size[axis] ? "beside" : "inside"})) rect.setAttribute(name, value);
      this.frame.append(rect);
    }
  }

  // The tool at the crosshair, for work without a mouse.
  dot() {
    if (this.tool === "fill") return this.edit(label => label.fill(this.voxel, this.axis, this.value));
    if (!["pen", "erase"].includes(this.tool)) return;
    this.nv.drawPenAxCorSag = 2 - this.axis;
    this.nv.drawPt(...this.voxel, this.tool === "erase" ? 0 : this.value);
    this.nv.drawPenAxCorSag = -1;
    this.settle();
  }

  // Move the crosshair within the plane clicked last.
  shift(right, up) {
    const [a, b] = [0, 1, 2].filter(axis => axis !== this.axis), by = [0, 0, 0];
    by[a] = right;
    by[b] = up;
    this.nv.moveCrosshairInVox(...by);
  }

  move(step) {
    const by = [0, 0, 0];
    by[this.axis] = step;
    this.nv.moveCrosshairInVox(...by);
  }
}

// A NIfTI of the same grid that is 1 outside of the region.
function outside(buffer, {shape, start, size}) {
  const header = buffer.slice(0, 352), view = new DataView(header), count = shape[0] * shape[1] * shape[2];
  view.setInt16(70, 2, true);
  view.setInt16(72, 8, true);
  view.setFloat32(108, 352, true);
  const made = new Uint8Array(352 + count).fill(1);
  made.set(new Uint8Array(header));
  for (let z = start[2]; z < start[2] + size[2]; z++) for (let y = start[1]; y < start[1] + size[1]; y++) {
    const from = 352 + start[0] + shape[0] * (y + shape[1] * z);
    made.fill(0, from, from + size[0]);
  }
  return made.buffer;
}
