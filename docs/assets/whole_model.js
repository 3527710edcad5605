// Written by bench/fill_docs.py from bench/results/production.json.
window.engramWholeModel = null;
