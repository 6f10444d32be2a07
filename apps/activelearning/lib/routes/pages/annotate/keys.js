// Keys of the page, and the list of them for its help.

const KEYS = [
  ["1 … 9", "draw this class"],
  ["P", "pen"], ["O", "filled outline"], ["F", "fill the area under the pointer's next click"], ["E", "eraser"], ["V", "look only"],
  ["+ / −", "brush larger or smaller"], ["↑ / ↓", "next or previous slice of the plane clicked last"],
  ["Space", "pen, eraser or fill at the crosshair"], ["← / → / ↑ / ↓ with Shift", "move the crosshair within the plane"],
  ["C", "copy the previous slice"], ["B", "fill empty slices between drawn ones"], ["Ctrl+Z / Ctrl+Y", "undo, redo"], ["Enter", "submit"], ["S", "skip"], ["R", "give back"],
  ["?", "this list"],
];
const WAYS = {arrowleft: [-1, 0], arrowright: [1, 0], arrowup: [0, 1], arrowdown: [0, -1]};
const TOOLS = {p: "pen", o: "outline", f: "fill", e: "erase", v: "look"};

export class Keys {
  constructor(actions, list) {
    for (const [keys, told] of KEYS) {
      const dt = document.createElement("dt"), dd = document.createElement("dd");
      dt.textContent = keys;
      dd.textContent = told;
      list.append(dt, dd);
    }
    // Before the viewer, which has keys of its own.
    window.addEventListener("keydown", event => this.press(event, actions), {capture: true});
  }

  press(event, actions) {
    const field = event.target.closest?.("input:not([type=range]), select, dialog");
    if (field || document.querySelector("dialog[open]")) return;
    const act = this.meaning(event, actions);
    if (!act) return;
    event.preventDefault();
    event.stopPropagation();
    act();
  }

  meaning(event, actions) {
    const key = event.key.toLowerCase();
    if (event.ctrlKey || event.metaKey) {
      if (key === "z") return event.shiftKey ? actions.redo : actions.undo;
      return key === "y" ? actions.redo : null;
    }
    if (event.altKey) return null;
    if (key >= "1" && key <= "9") return () => actions.class(Number(key) - 1);
    if (event.shiftKey && key in WAYS) return () => actions.shift(...WAYS[key]);
    if (key in TOOLS) return () => actions.tool(TOOLS[key]);
    if (key === "enter" || key === " ") { if (event.target.closest?.("button, a")) return null; }
    if (key === "enter") return actions.submit;
    const others = {"+": () => actions.size(1), "=": () => actions.size(1), "-": () => actions.size(-1), arrowup: () => actions.slice(1),
      arrowdown: () => actions.slice(-1), " ": actions.dot, c: actions.copy, b: actions.between, s: actions.skip, r: actions.release, "?": actions.help};
    return others[key] || null;
  }
}
