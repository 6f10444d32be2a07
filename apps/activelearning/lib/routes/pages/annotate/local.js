// Drafts in this browser: there at once, and also when the server is not.

const PREFIX = "patchwise-draft-";

export class Local {
  keep(query, voxels) {
    // Runs of equal values: drafts are mostly background, and the place for them is small.
    const runs = [];
    for (let i = 0; i < voxels.length;) {
      let j = i;
      while (j < voxels.length && voxels[j] === voxels[i]) j++;
      runs.push(voxels[i], j - i);
      i = j;
    }
    try { localStorage.setItem(PREFIX + query, JSON.stringify(runs)); }
    catch { /* full: the server keeps the draft as well */ }
  }

  get(query) {
    const runs = JSON.parse(localStorage.getItem(PREFIX + query) || "null");
    if (!runs) return null;
    const values = [];
    for (let i = 0; i < runs.length; i += 2) for (let k = 0; k < runs[i + 1]; k++) values.push(runs[i]);
    return Uint8Array.from(values);
  }

  drop(query) { localStorage.removeItem(PREFIX + query); }
}
