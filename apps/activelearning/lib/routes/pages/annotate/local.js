// Drafts in this browser: there at once, and also when the server is not.

const PREFIX = "patchwise-draft-";

export class Local {
  // start: what the drawing began with, "nothing" or "prediction".
  keep(query, voxels, start) {
    // Runs of equal values: drafts are mostly background, and the place for them is small.
    const runs = [];
    for (let i = 0; i < voxels.length;) {
      let j = i;
      while (j < voxels.length && voxels[j] === voxels[i]) j++;
      runs.push(voxels[i], j - i);
      i = j;
    }
    try { localStorage.setItem(PREFIX + query, JSON.stringify({runs, start})); }
    catch { /* full: the server keeps the draft as well */ }
  }

  get(query) {
    const kept = JSON.parse(localStorage.getItem(PREFIX + query) || "null");
    if (!kept) return null;
    // Drafts of earlier versions are the runs alone.
    const {runs, start} = Array.isArray(kept) ? {runs: kept, start: "nothing"} : kept;
    const values = [];
    for (let i = 0; i < runs.length; i += 2) for (let k = 0; k < runs[i + 1]; k++) values.push(runs[i]);
    return {voxels: Uint8Array.from(values), start};
  }

  drop(query) { localStorage.removeItem(PREFIX + query); }
}
