"""Cells are read from the formats of other tools, whole or in blocks, and damaged files are one line."""

import gzip
import os
import pickle
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import anndata
import h5py
import numpy as np
import pandas as pd
import pytest
import scipy.io
import tiledbsoma.io
import zarr

from tests.golden_cases import CHECKPOINT, TOLERANCE, relative_error
from tests.h5ad_files import GENES, random_adata
from transcriptformer.checkpoint.load import load_checkpoint
from transcriptformer.checkpoint.published import load_config
from transcriptformer.config import DataConfig
from transcriptformer.data.fingerprint import fingerprint
from transcriptformer.data.source import CellSource, open_source
from transcriptformer.errors import DataError, TranscriptFormerError, UsageError
from transcriptformer.inference.run import embed

pytestmark = [
    pytest.mark.filterwarnings("ignore:Writing zarr v2 data will no longer be the default"),
    pytest.mark.filterwarnings("ignore:zarr v3 autosharding will be the default"),
    pytest.mark.filterwarnings("ignore:Consolidated metadata is currently not part in the Zarr format 3"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning"),
]

N_CELLS, N_GENES = 30, 60
BLOCKS = [(0, 30), (0, 1), (7, 20), (29, 30)]
BARCODES = [f"AAAC{i:04d}-1" for i in range(N_CELLS)]
SYMBOLS = [f"name{i}" for i in range(N_GENES)]
TYPES = ["Gene Expression" if i % 5 else "Antibody Capture" for i in range(N_GENES)]
IS_GENE = np.array(TYPES) == "Gene Expression"


def the_cells() -> anndata.AnnData:
    adata = random_adata(N_CELLS, n_genes=N_GENES)
    adata.obs_names = BARCODES
    return adata


def text(values: list[str]) -> np.ndarray:
    return np.array(values, dtype="S")


def write_counts(group: h5py.Group) -> None:
    counts = the_cells().X.tocsr()
    for name in ("data", "indices", "indptr"):
        group[name] = getattr(counts, name).astype(np.int64)
    group["shape"] = np.array([N_GENES, N_CELLS], np.int32)
    group["barcodes"] = text(BARCODES)


def write_v3(path: Path, types: list[str] = TYPES) -> Path:
    with h5py.File(path, "w") as file:
        write_counts(file.create_group("matrix"))
        features = {"id": GENES[:N_GENES], "name": SYMBOLS, "feature_type": types, "genome": ["GRCh38"] * N_GENES}
        for name, values in features.items():
            file[f"matrix/features/{name}"] = text(values)
    return path


def write_v2(path: Path, *genomes: str) -> Path:
    with h5py.File(path, "w") as file:
        for genome in genomes:
            write_counts(file.create_group(genome))
            file[f"{genome}/genes"], file[f"{genome}/gene_names"] = text(GENES[:N_GENES]), text(SYMBOLS)
    return path


def write_folder(folder: Path, features: str = "features.tsv", zipped: bool = False, prefix: str = "") -> Path:
    folder.mkdir()
    names = zip(GENES[:N_GENES], SYMBOLS, TYPES, strict=True)
    rows = ["\t".join(row if features == "features.tsv" else row[:2]) for row in names]
    (folder / f"{prefix}{features}").write_text("".join(f"{row}\n" for row in rows))
    (folder / f"{prefix}barcodes.tsv").write_text("".join(f"{barcode}\n" for barcode in BARCODES))
    scipy.io.mmwrite(folder / f"{prefix}matrix.mtx", the_cells().X.T.astype(np.int64))
    for path in list(folder.iterdir()) if zipped else []:
        path.with_name(f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes()))
        path.unlink()
    return folder


def write_mudata(path: Path) -> Path:
    """Write two modalities, of which `rna` has the cells; the root has metadata of its own."""
    root = h5py.File(path, "w") if path.suffix == ".h5mu" else zarr.open_group(str(path), mode="w")
    root.attrs["encoding-type"] = "MuData"
    anndata.io.write_elem(root, "mod", {"rna": the_cells(), "prot": random_adata(7, n_genes=3)})
    for name in ("obs", "var"):
        anndata.io.write_elem(root, name, pd.DataFrame(index=["of all modalities"]))
    if isinstance(root, h5py.File):
        root.close()
    return path


def write_loom(path: Path, named: bool = True) -> Path:
    counts = the_cells().X.toarray().T
    with h5py.File(path, "w") as file:
        file.create_dataset("matrix", data=np.log1p(counts), chunks=(16, 16), compression="gzip")
        file["layers/counts"] = counts.astype(np.int32)
        file["row_attrs/Accession"], file["row_attrs/Gene"] = text(GENES[:N_GENES]), text(SYMBOLS)
        file["col_attrs/assay"], file["col_attrs/UMAP"] = text(["Drop-seq"] * N_CELLS), np.zeros((N_CELLS, 2))
        if named:
            file["col_attrs/CellID"] = BARCODES
    return path


def write_zipped(path: Path, in_folder: bool = False) -> Path:
    the_cells().write_zarr(path.parent / "plain.zarr")
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for file in sorted((path.parent / "plain.zarr").rglob("*")):
            archive.write(file, file.relative_to(path.parent if in_folder else path.parent / "plain.zarr"))
    return path


def write_gzipped(path: Path) -> Path:
    the_cells().write_h5ad(path.with_suffix(""))
    path.write_bytes(gzip.compress(path.with_suffix("").read_bytes()))
    return path


def write_soma(path: Path, layer: str = "data") -> Path:
    tiledbsoma.io.from_anndata(str(path), the_cells(), "RNA", X_layer_name=layer)
    return path


WRITERS: dict[str, Callable[[Path], Path]] = {
    "Cell Ranger 3": lambda folder: write_v3(folder / "filtered_feature_bc_matrix.h5"),
    "Cell Ranger 3, genes only": lambda folder: write_v3(folder / "genes.h5", ["Gene Expression"] * N_GENES),
    "Cell Ranger 2": lambda folder: write_v2(folder / "filtered_gene_bc_matrices_h5.h5", "hg19"),
    "mtx folder": lambda folder: write_folder(folder / "mtx"),
    "gzipped mtx folder": lambda folder: write_folder(folder / "mtx", zipped=True),
    "mtx folder with genes.tsv": lambda folder: write_folder(folder / "mtx", "genes.tsv"),
    "mtx folder with prefixes": lambda folder: write_folder(folder / "mtx", prefix="GSM1234567_", zipped=True),
    "h5mu": lambda folder: write_mudata(folder / "cells.h5mu"),
    "zarr MuData": lambda folder: write_mudata(folder / "cells.zarr"),
    "loom": lambda folder: write_loom(folder / "cells.loom"),
    "zarr.zip": lambda folder: write_zipped(folder / "cells.zarr.zip"),
    "zarr.zip with a folder": lambda folder: write_zipped(folder / "cells.zarr.zip", in_folder=True),
    "h5ad.gz": lambda folder: write_gzipped(folder / "cells.h5ad.gz"),
    "SOMA": lambda folder: write_soma(folder / "soma"),
    "SOMA with counts in raw": lambda folder: write_soma(folder / "soma", "raw"),
}

HAVE_OTHER_FEATURES = {"Cell Ranger 3", "mtx folder", "gzipped mtx folder", "mtx folder with prefixes"}


def assert_holds_the_cells(source: CellSource, is_kept: np.ndarray) -> None:
    assert list(source.gene_ids) == list(np.array(GENES[:N_GENES])[is_kept])
    assert len(source) == N_CELLS
    for start, stop in BLOCKS:
        expected = the_cells().X[start:stop].toarray()[:, is_kept]
        np.testing.assert_array_equal(source.counts(start, stop).toarray(), expected)
        assert list(source.obs.rows(start, stop).index) == BARCODES[start:stop]


@pytest.mark.parametrize("read_in_blocks", [True, False])
@pytest.mark.parametrize("name", list(WRITERS))
def test_the_cells_are_read_and_only_genes_become_columns(name: str, read_in_blocks: bool, tmp_path: Path) -> None:
    is_kept = IS_GENE if name in HAVE_OTHER_FEATURES else np.ones(N_GENES, bool)
    path = WRITERS[name](tmp_path)
    source = open_source(path, read_in_blocks=read_in_blocks)
    assert_holds_the_cells(source, is_kept)
    assert_holds_the_cells(pickle.loads(pickle.dumps(source)), is_kept)
    source.close()
    assert_holds_the_cells(source, is_kept)
    source.close()
    assert fingerprint(path) == fingerprint(path)


@pytest.mark.parametrize("name", ["Cell Ranger 3", "mtx folder", "zarr.zip", "h5ad.gz", "h5mu", "loom"])
def test_workers_read_every_format(name: str, tmp_path: Path) -> None:
    options = {"model.data_config.n_data_workers": 2, "model.data_config.block_size": 5}
    checkpoint = load_checkpoint(
        CHECKPOINT, load_config(CHECKPOINT, {**options, "model.inference_config.precision": "32"})
    )
    expected = the_cells()[:, IS_GENE if name in HAVE_OTHER_FEATURES else slice(None)].copy()
    if "assay" not in open_source(WRITERS[name](tmp_path)).obs.columns:
        del expected.obs["assay"]
    elif name == "loom":
        expected.obs["assay"] = "Drop-seq"
    place = next(path for path in sorted(tmp_path.iterdir()) if path.suffix not in (".h5ad", ".zarr"))
    result, computed = embed(place, checkpoint), embed(expected, checkpoint)
    assert list(result.obs_names) == BARCODES
    assert relative_error(result.obsm["embeddings"], computed.obsm["embeddings"]) < TOLERANCE


def test_metadata_of_genes_is_read(tmp_path: Path) -> None:
    for path in (write_v3(tmp_path / "v3.h5"), write_v2(tmp_path / "v2.h5", "hg19"), write_folder(tmp_path / "mtx")):
        source = open_source(path, DataConfig(gene_col_name="feature_name"))
        is_kept = np.ones(N_GENES, bool) if path.name == "v2.h5" else IS_GENE
        assert list(source.gene_ids) == list(np.array(SYMBOLS)[is_kept])


def test_cells_of_a_loom_file_without_names_are_numbered(tmp_path: Path) -> None:
    source = open_source(write_loom(tmp_path / "cells.loom", named=False))
    obs = source.obs.rows(0, N_CELLS)
    assert list(obs.index) == [str(i) for i in range(N_CELLS)]
    assert list(obs.columns) == ["assay"]
    assert source.place == "/layers/counts"


def test_another_modality_can_be_chosen(tmp_path: Path) -> None:
    for path in (write_mudata(tmp_path / "cells.h5mu"), write_mudata(tmp_path / "cells.zarr")):
        assert len(open_source(path, DataConfig(modality="prot"))) == 7
        with pytest.raises(DataError, match=r"no modality 'atac'; its modalities are: (rna, prot|prot, rna); choose"):
            open_source(path, DataConfig(modality="atac"))
    with pytest.raises(UsageError, match="modality"):
        DataConfig(modality="../rna")


def test_a_gzipped_file_is_decompressed_until_it_is_closed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    path = write_gzipped(tmp_path / "cells.h5ad.gz")
    with caplog.at_level("INFO"):
        source = open_source(path)
    assert "decompressing to a temporary file" in caplog.text
    copy = pickle.loads(pickle.dumps(source))
    del copy  # another process, which does not delete the file
    assert len(list(folder.iterdir())) == 1
    source.counts(0, 1)
    source.close()
    assert list(folder.iterdir()) == []


def test_a_decompressed_file_is_deleted_when_the_process_ends(tmp_path: Path) -> None:
    path = write_gzipped(tmp_path / "cells.h5ad.gz")
    folder = tmp_path / "temporary"
    folder.mkdir()
    code = (
        "import os, sys; from transcriptformer.data.source import open_source; "
        "source = open_source(sys.argv[1]); print(len(os.listdir(os.environ['TMPDIR'])))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, path], env={**os.environ, "TMPDIR": str(folder)}, capture_output=True, check=True
    )
    assert done.stdout == b"1\n"
    assert list(folder.iterdir()) == []


def test_a_full_temporary_folder_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_gzipped(tmp_path / "cells.h5ad.gz")
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage)
    with pytest.raises(UsageError, match=r"decompressing takes 0\.0 GiB, but only 0\.0 GiB are free .* set TMPDIR"):
        open_source(path)


def rewrite(path: Path, **arrays: np.ndarray | None) -> Path:
    """Replace or delete members of the group `matrix`."""
    with h5py.File(path, "r+") as file:
        for name, values in arrays.items():
            del file[f"matrix/{name}"]
            if values is not None:
                file[f"matrix/{name}"] = values
    return path


def shorten(path: Path) -> Path:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    return path


def other_h5(path: Path) -> Path:
    with h5py.File(path, "w") as file:
        file["barcode_idx"], file["count"] = np.arange(3), np.arange(3)
    return path


def linked(path: Path) -> Path:
    write_v3(path)
    with h5py.File(path, "r+") as file:
        del file["matrix/barcodes"]
        file["matrix/barcodes"] = h5py.ExternalLink("secret.h5", "/x")
    return path


def changed(folder: Path, name: str, lines: str | None) -> Path:
    write_folder(folder)
    if lines is None:
        (folder / name).unlink()
    else:
        (folder / name).write_text(lines)
    return folder


def without_rna(path: Path) -> Path:
    tiledbsoma.io.from_anndata(str(path), the_cells(), "ATAC")
    return path


def collection(path: Path) -> Path:
    tiledbsoma.Collection.create(str(path)).close()
    return path


def gzipped_text(path: Path) -> Path:
    path.write_bytes(gzip.compress(b"gene,cell\n"))
    return path


def loom_of_other_length(path: Path) -> Path:
    write_loom(path)
    with h5py.File(path, "r+") as file:
        del file["col_attrs/CellID"]
        file["col_attrs/CellID"] = BARCODES[:-1]
    return path


def of_r(path: Path) -> Path:
    path.write_bytes(gzip.compress(b"X\n"))
    return path


DAMAGED: dict[str, tuple[Callable[[Path], Path], str]] = {
    "no barcodes": (lambda at: rewrite(write_v3(at / "a.h5"), barcodes=None), r"incomplete: matrix lacks barcodes"),
    "data short": (lambda at: rewrite(write_v3(at / "a.h5"), data=np.ones(3)), r"damaged: matrix of shape"),
    "shape": (lambda at: rewrite(write_v3(at / "a.h5"), shape=np.array([7, N_CELLS])), r"damaged: matrix has 7 rows"),
    "index": (
        lambda at: rewrite(write_v3(at / "a.h5"), indices=np.full(the_cells().X.nnz, 999)),
        r"a\.h5: .*damaged",
    ),
    "barcodes short": (lambda at: rewrite(write_v3(at / "a.h5"), barcodes=text(["A"])), r"for 1 cells and 48 genes"),
    "truncated h5": (lambda at: shorten(write_v3(at / "a.h5")), r"a\.h5: .*truncated or damaged"),
    "no genes": (
        lambda at: write_v3(at / "a.h5", ["Peaks"] * N_GENES),
        r"has no features of type 'Gene Expression'; its types are: Peaks",
    ),
    "several genomes": (lambda at: write_v2(at / "a.h5", "hg19", "mm10"), r"one matrix per genome: hg19, mm10; write"),
    "external link": (lambda at: linked(at / "a.h5"), r"barcodes is an external link .* --allow-external-links"),
    "molecule info": (
        lambda at: other_h5(at / "molecule_info.h5"),
        r"not an AnnData .*; or a loom file, or a matrix of Cell Ranger such as .*; it contains: barcode_idx, count",
    ),
    "mtx folder without barcodes": (
        lambda at: changed(at / "mtx", "barcodes.tsv", None),
        r"mtx: lacks barcodes\.tsv \(or \.gz\); expected matrix\.mtx",
    ),
    "mtx folder without matrix": (lambda at: changed(at / "mtx", "matrix.mtx", None), r"mtx: lacks matrix\.mtx"),
    "few features": (
        lambda at: changed(at / "mtx", "features.tsv", f"{GENES[0]}\ta\tGene Expression\n"),
        r"matrix\.mtx: damaged: has 60 rows for 1 features",
    ),
    "ragged features": (
        lambda at: changed(at / "mtx", "features.tsv", f"{GENES[0]}\ta\n{GENES[1]}\n"),
        r"features\.tsv: damaged: line 2 has 1 columns, but line 1 has 2",
    ),
    "empty features": (lambda at: changed(at / "mtx", "features.tsv", ""), r"features\.tsv: is empty"),
    "few barcodes": (lambda at: changed(at / "mtx", "barcodes.tsv", "A\n"), r"for 1 cells and 48 genes"),
    "bad matrix": (lambda at: changed(at / "mtx", "matrix.mtx", "nothing\n"), r"matrix\.mtx: cannot be read"),
    "short matrix": (lambda at: shorten(write_folder(at / "mtx") / "matrix.mtx").parent, r"matrix\.mtx: cannot be"),
    "truncated gzipped features": (
        lambda at: shorten(write_folder(at / "mtx", zipped=True) / "features.tsv.gz").parent,
        r"features\.tsv\.gz: cannot be read: truncated",
    ),
    "loom": (lambda at: loom_of_other_length(at / "a.loom"), r"for 29 cells and 60 genes"),
    "truncated loom": (lambda at: shorten(write_loom(at / "a.loom")), r"a\.loom: .*truncated or damaged"),
    "truncated h5mu": (lambda at: shorten(write_mudata(at / "a.h5mu")), r"a\.h5mu: .*truncated or damaged"),
    "truncated zip": (lambda at: shorten(write_zipped(at / "a.zarr.zip")), r"cannot be read as a zipped zarr store"),
    "truncated gzip": (lambda at: shorten(write_gzipped(at / "a.h5ad.gz")), r"cannot be decompressed: truncated"),
    "gzipped text": (lambda at: gzipped_text(at / "a.h5ad.gz"), r"gzipped, but not an HDF5 file inside"),
    "SOMA without RNA": (lambda at: without_rna(at / "soma"), r"has no measurement 'RNA'; it has: ATAC"),
    "SOMA collection": (lambda at: collection(at / "soma"), r"is a Collection of TileDB-SOMA; expected an Experiment"),
    "RDS": (lambda at: of_r(at / "a.rds"), r'in R: x <- readRDS\("a\.rds"\); anndataR::write_h5ad\(x, "a\.h5ad"\)'),
    "RData": (lambda at: of_r(at / "a.RData"), r"in R: x <- get\(load\("),
    "h5seurat": (lambda at: other_h5(at / "a.h5Seurat"), r"in R: x <- SeuratDisk::LoadH5Seurat\("),
    "mtx file": (lambda at: write_folder(at / "mtx") / "matrix.mtx", r"name the folder of the matrix instead, .*mtx"),
}


@pytest.mark.parametrize("name", list(DAMAGED))
def test_damaged_and_foreign_files_are_one_line(name: str, tmp_path: Path) -> None:
    write, message = DAMAGED[name]
    path = write(tmp_path)
    with pytest.raises(TranscriptFormerError, match=message) as raised:
        open_source(path).counts(0, N_CELLS)
    assert "\n" not in str(raised.value)


def test_several_matrices_in_a_folder_are_not_mixed(tmp_path: Path) -> None:
    write_folder(tmp_path / "mtx", prefix="GSM1_")
    for path in list((tmp_path / "mtx").iterdir()):
        shutil.copyfile(path, path.with_name(path.name.replace("GSM1_", "GSM2_")))
    with pytest.raises(UsageError, match=r"several matrices \(GSM1_\*, GSM2_\*\); move each"):
        open_source(tmp_path / "mtx")


def test_links_out_of_a_folder_are_refused(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "mtx")
    (folder / "barcodes.tsv").rename(tmp_path / "elsewhere.tsv")
    (folder / "barcodes.tsv").symlink_to(tmp_path / "elsewhere.tsv")
    with pytest.raises(DataError, match=r"barcodes\.tsv is a link out of the store, .*--allow-external-links"):
        open_source(folder)
    assert_holds_the_cells(open_source(folder, DataConfig(allow_external_links=True)), IS_GENE)


def test_of_layers_of_soma_only_the_one_with_counts_is_loaded(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    adata = the_cells()
    adata.layers["counts"] = adata.X.copy()
    adata.X = adata.X.log1p()
    tiledbsoma.io.from_anndata(str(tmp_path / "soma"), adata, "RNA")
    caplog.set_level("INFO")
    source = open_source(tmp_path / "soma")
    assert source.describe()["counts"] == "counts from X['counts'] (X['data'] is log-normalized)"
    assert [record.message for record in caplog.records if "loading" in record.message] == [
        f"{tmp_path / 'soma'}: loading X['counts'] into memory"
    ]
    np.testing.assert_array_equal(source.counts(0, len(source)).toarray(), adata.layers["counts"].toarray())


def test_tiledbsoma_is_named_if_it_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_soma(tmp_path / "soma")
    monkeypatch.setitem(sys.modules, "tiledbsoma", None)
    with pytest.raises(UsageError, match=r'not installed .* pip install "transcriptformer\[census\]"'):
        open_source(tmp_path / "soma")


def test_a_filter_that_is_not_installed_is_named(tmp_path: Path) -> None:
    path, unknown, optional = tmp_path / "cells.h5ad", 32767, h5py.h5z.FLAG_OPTIONAL
    the_cells().write_h5ad(path)
    with h5py.File(path, "r+") as file:
        n = len(file["X/data"])
        del file["X/data"]
        settings = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        settings.set_chunk((n,))
        settings.set_filter(unknown, optional)
        dataset = h5py.h5d.create(
            file["X"].id, b"data", h5py.h5t.NATIVE_FLOAT, h5py.h5s.create_simple((n,)), dcpl=settings
        )
        h5py.Dataset(dataset).id.write_direct_chunk((0,), b"compressed")
    with pytest.raises(
        DataError, match=r"X/data is compressed by a filter .* \(unknown, 32767\); run: pip install hdf5"
    ):
        open_source(path)


@pytest.mark.parametrize("codec", ["Zstd", "Blosc", "LZ4"])
def test_files_compressed_with_hdf5plugin_are_read(codec: str, tmp_path: Path) -> None:
    pytest.importorskip("hdf5plugin")
    path = tmp_path / "cells.h5ad"
    the_cells().write_h5ad(path)
    rewrite = (
        "import sys, h5py, hdf5plugin; file = h5py.File(sys.argv[1], 'r+'); values = file['X/data'][:]; "
        f"del file['X/data']; file.create_dataset('X/data', data=values, **hdf5plugin.{codec}())"
    )
    subprocess.run([sys.executable, "-c", rewrite, path], check=True)
    assert_holds_the_cells(open_source(path), np.ones(N_GENES, bool))


def test_data_frames_of_anndata_0_7_are_read_in_blocks(tmp_path: Path) -> None:
    """They have no encoding attributes, and refer to their categories."""
    path, donors = tmp_path / "cells.h5ad", pd.Categorical(np.where(np.arange(N_CELLS) % 3, "A", "B"), ordered=True)
    adata = the_cells()
    adata.obs = pd.DataFrame({"donor": donors}, index=BARCODES)
    adata.write_h5ad(path)
    with h5py.File(path, "r+") as file:
        obs = file["obs"]
        for element in (obs, *obs.values(), file["var"], *file["var"].values()):
            for name in [name for name in element.attrs if name.startswith("encoding")]:
                del element.attrs[name]
        obs["__categories/donor"] = obs["donor/categories"][:]
        obs["__categories/donor"].attrs["ordered"] = True
        codes = obs["donor/codes"][:]
        del obs["donor"]
        obs["donor"] = codes
        obs["donor"].attrs["categories"] = obs["__categories/donor"].ref
    source = open_source(path)
    assert_holds_the_cells(source, np.ones(N_GENES, bool))
    pd.testing.assert_extension_array_equal(source.obs.rows(4, 9, ["donor"])["donor"].array, donors[4:9])
