"""Write the training data of the demo model to a folder: cells that are not held out, and gene features.

    python scripts/prepare_demo.py FOLDER

`make demo-model` runs this, then `transcriptformer train --config conf/demo_train_config.yaml`.
"""

import sys
from pathlib import Path

from transcriptformer.demo.cells import HELD_OUT, coexpression_features, load_cells, write_gene_features

if __name__ == "__main__":
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    cells = load_cells()
    cells = cells[~cells.obs[HELD_OUT]].copy()
    cells.write_h5ad(folder / "cells.h5ad")
    write_gene_features(folder / "pbmc_coexpression.h5", cells.var_names, coexpression_features(cells))
