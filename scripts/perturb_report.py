"""Knock out markers in the demo's B cells, against genes of like expression; print the tables of docs/perturb.md."""

import transcriptformer as tf
from transcriptformer.demo.cells import CELL_TYPE, load_cells
from transcriptformer.demo.run import CHECKPOINT

MARKERS = ["CD79A", "CD79B", "MS4A1", "CD74", "BANK1", "BLK", "IGJ", "HLA-DRA"]
NULL = 100


def main() -> None:
    """Perturb all B cells, with genes in the order of the file and shuffled."""
    cells = load_cells()
    b_cells = cells[cells.obs[CELL_TYPE] == "CD19+ B"].copy()
    for is_shuffled in (False, True):
        settings = {"model.data_config.gene_col_name": "index", "model.data_config.randomize_genes": is_shuffled}
        model = tf.load(CHECKPOINT, device="cpu", precision="32", settings=settings)
        tf.perturb(b_cells, model, knock_out=MARKERS, null=NULL)
        table = b_cells.uns["perturbation_table"].drop(columns=["gene", "group", "n_cells", "n_emptied"])
        print("genes shuffled" if is_shuffled else "genes as in the file")
        print(table.to_string(index=False, float_format="%.2g"), flush=True)


if __name__ == "__main__":
    main()
