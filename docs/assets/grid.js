// Written by bench/fill_docs.py from bench/results/bytedmd_grid.json.
window.engramGrid = null;
