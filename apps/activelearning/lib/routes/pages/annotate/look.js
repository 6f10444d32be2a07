// Colours of classes and windows of grey values.

const COLOURS = [[239, 83, 80], [77, 182, 172], [255, 202, 40], [121, 134, 203], [255, 138, 101], [174, 213, 129],
  [240, 98, 146], [79, 195, 247], [186, 104, 200], [212, 225, 87]];
export const colour = place => COLOURS[place % COLOURS.length];

export const WINDOWS = {
  "automatic": null, "full range": "full", "soft tissue (CT)": [-160, 240], "lung (CT)": [-1350, 150], "bone (CT)": [-450, 1050],
  "brain (CT)": [0, 80],
};
