"""`transcriptformer inference`: embed cells."""

from pathlib import Path
from typing import Annotated

import typer

from transcriptformer.cli.options import (
    AllowExternalLinks,
    ConfigOverride,
    Debug,
    Device,
    DuplicateGenes,
    GeneColName,
    GeneMap,
    InferenceBatchSize,
    Layer,
    MakeNamesUnique,
    Modality,
    NDataWorkers,
    NumGpus,
    NumNodes,
    Precision,
    PretrainedEmbedding,
    RecoverCounts,
    RemoveDuplicateGenes,
    Resume,
    UseRawOption,
    input_settings,
    option,
    paths_setting,
    run_settings,
)


def inference(
    checkpoint_path: Annotated[Path, option("Checkpoint folder.", metavar="DIR")],
    data_file: Annotated[
        list[str],
        option("File with raw counts; wildcards and s3:// allowed; repeatable.", metavar="FILE"),
    ],
    more_files: Annotated[
        list[str] | None, typer.Argument(metavar="FILE...", help="More files, such as those of a wildcard.")
    ] = None,
    output_path: Annotated[Path | None, option("Output folder.", metavar="DIR", default="./inference_results")] = None,
    output_filename: Annotated[
        str | None, option("Name of the output, .h5ad or .zarr.", metavar="NAME", default="embeddings.h5ad")
    ] = None,
    batch_size: InferenceBatchSize = None,
    gene_col_name: GeneColName = None,
    gene_map: GeneMap = None,
    layer: Layer = None,
    modality: Modality = None,
    precision: Precision = None,
    pretrained_embedding: PretrainedEmbedding = None,
    clip_counts: Annotated[float | None, option("Clip counts at this value.", metavar="NUMBER", default=30)] = None,
    filter_to_vocabs: Annotated[
        bool | None,
        option(
            "Drop genes outside the vocabulary, or keep them as unknown.",
            "--filter-to-vocabs/--no-filter-to-vocabs",
            default="filter-to-vocabs",
        ),
    ] = None,
    use_raw: UseRawOption = None,
    recover_counts: RecoverCounts = None,
    duplicate_genes: DuplicateGenes = None,
    embedding_layer_index: Annotated[
        int | None, option("Layer of the embeddings, from 0; -1 is the last.", metavar="INT", default=-1)
    ] = None,
    model_type: Annotated[
        str | None,
        option(
            "Model; esm2ce is the baseline without a transformer.",
            metavar="transcriptformer|esm2ce",
            default="transcriptformer",
        ),
    ] = None,
    emb_type: Annotated[
        str | None, option("One embedding per cell, or per gene and cell (cge).", metavar="cell|cge", default="cell")
    ] = None,
    cge_pool: Annotated[
        str | None, option("Average cge per gene, or per gene and obs column.", metavar="gene|COLUMN")
    ] = None,
    remove_duplicate_genes: RemoveDuplicateGenes = None,
    make_names_unique: MakeNamesUnique = None,
    device: Device = None,
    num_gpus: NumGpus = None,
    num_nodes: NumNodes = None,
    oom_dataloader: Annotated[
        bool | None,
        option(
            "Read counts in blocks, or load files into memory first.",
            "--oom-dataloader/--no-oom-dataloader",
            default="oom-dataloader",
        ),
    ] = None,
    n_data_workers: NDataWorkers = None,
    allow_external_links: AllowExternalLinks = None,
    resume: Resume = False,
    config_override: ConfigOverride = None,
    debug: Debug = False,
) -> None:
    """Embed the cells of h5ad files or zarr stores.

    The output is one file or store with an embedding per cell, and the names and metadata of the cells.
    """
    options: dict[str, object] = {
        **input_settings(
            *(gene_col_name, gene_map, layer, modality, use_raw, recover_counts),
            *(duplicate_genes, remove_duplicate_genes, allow_external_links),
        ),
        **run_settings(
            *(output_path, output_filename, batch_size, precision, device),
            *(make_names_unique, num_gpus, num_nodes, resume),
        ),
        "model.model_type": model_type,
        "model.data_config.clip_counts": clip_counts,
        "model.data_config.filter_to_vocabs": filter_to_vocabs,
        "model.data_config.n_data_workers": n_data_workers,
        "model.inference_config.pretrained_embedding": paths_setting(pretrained_embedding),
        "model.inference_config.embedding_layer_index": embedding_layer_index,
        "model.inference_config.emb_type": emb_type,
        "model.inference_config.cge_pool": cge_pool,
        "model.inference_config.oom_dataloader": oom_dataloader,
    }
    from transcriptformer.cli.reporting import CountProgress, plain_errors, resumable, say

    with plain_errors(debug), resumable("--resume"):
        from transcriptformer.checkpoint.published import load_config
        from transcriptformer.inference.embeddings import describe
        from transcriptformer.inference.run import run

        config = load_config(checkpoint_path, options, config_override or [])
        with CountProgress("cells") as progress:
            output = run([*data_file, *(more_files or [])], checkpoint_path, config, progress.update)
        if output is not None:
            say(f"{describe(output)} in {output}")
