"""Where images come from: photographs, pairs with ground truth, tars, procedural scenes."""
