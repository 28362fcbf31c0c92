"""`transcriptformer embed-proteins`: the protein embeddings of a species."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from transcriptformer.proteins.embed import Similarities, Summary


def embed_proteins(
    fasta: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Proteins of a species as FASTA, plain or gzipped.")
    ] = None,
    organism_key: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Fetch them from Ensembl instead; such as homo_sapiens."),
    ] = None,
    output_dir: Annotated[Path, typer.Option(metavar="DIR", help="Folder of <species>_gene.h5.")] = Path(
        "protein_embedding_results"
    ),
    model: Annotated[
        str,
        typer.Option(metavar="NAME|DIR", help="ESM-2: a name on the Hugging Face hub, or a folder."),
    ] = "facebook/esm2_t36_3B_UR50D",
    layer: Annotated[
        int | None,
        typer.Option(
            metavar="INT",
            help="Layer whose states are taken, from 1.",
            show_default="33 of 36 layers, as published; of other models the last",
        ),
    ] = None,
    id_from: Annotated[
        str,
        typer.Option(
            metavar="gene|gene_symbol|REGEX",
            help="Where headers tell the gene: gene:… without its version, gene_symbol:…, or what the one group of a "
            "regular expression finds.",
        ),
    ] = "gene",
    isoforms: Annotated[
        str,
        typer.Option(metavar="first|longest|mean", help="Which of a gene's proteins stand for it."),
    ] = "first",
    max_length: Annotated[int, typer.Option(metavar="INT", min=1, help="Residues at which a protein is cut.")] = 1022,
    tokens_per_batch: Annotated[
        int | None,
        typer.Option(
            metavar="INT", min=1, help="Most tokens of a batch.", show_default="16384 on a GPU, 4096 on a CPU"
        ),
    ] = None,
    device: Annotated[str, typer.Option(metavar="auto|cpu|cuda|mps", help="Where to compute.")] = "auto",
    precision: Annotated[
        str,
        typer.Option(
            metavar="32|16-mixed|bf16-mixed",
            help="32, 16-mixed (fp16 on a GPU; bf16 on a CPU that has it, else 32) or bf16-mixed.",
        ),
    ] = "32",
    num_gpus: Annotated[int, typer.Option(metavar="INT", help="GPUs to use, -1 for all; on a CPU, processes.")] = 1,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with a run of the same that was ended before it was done.")
    ] = False,
    compare: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Protein embeddings to compare the result with, gene by gene."),
    ] = None,
    max_retries: Annotated[
        int, typer.Option(metavar="INT", min=0, help="Tries in a row to fetch proteins that may fail, after the first.")
    ] = 5,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Compute the protein embeddings of a species with ESM-2.

    The result is for inference --pretrained-embedding.
    """
    from transcriptformer.cli.reporting import CountProgress, plain_errors, resumable, say

    with plain_errors(debug), resumable("--resume"):
        from transcriptformer.errors import UsageError

        if (fasta is None) == (organism_key is None):
            raise UsageError("name the proteins by one of --fasta and --organism-key")

        from transcriptformer.checkpoint.vocabs import read_gene_ids
        from transcriptformer.proteins import embed

        settings = embed.Settings(
            model=model,
            layer=layer,
            id_from=id_from,
            isoforms=isoforms,
            max_length=max_length,
            tokens_per_batch=tokens_per_batch,
            device=device,
            precision=precision,
            num_gpus=num_gpus,
            resume=resume,
        )
        if compare is not None:
            read_gene_ids(compare)  # before hours of work
        if organism_key is not None:
            output = output_dir / f"{organism_key}_gene.h5"
            fasta = _fetch(organism_key, output_dir, max_retries)
        else:
            assert fasta is not None
            output = embed.result_path(fasta, output_dir)
        with CountProgress("proteins") as progress:
            summary = embed.embed_proteins(fasta, output, settings, progress.update)
        say(f"{output}: {_describe(summary, max_length)}")
        if compare is not None:
            say(f"{compare}: {_describe_similarities(embed.compare(output, compare))}")


def _fetch(organism_key: str, folder: Path, max_retries: int) -> Path:
    from transcriptformer.cli.reporting import ByteProgress, resumable
    from transcriptformer.fetching.fetcher import Fetcher
    from transcriptformer.proteins.ensembl import fasta_source, fetch_fasta

    source = fasta_source(organism_key)
    with resumable(), ByteProgress() as progress:
        fetcher = Fetcher(max_retries, advance=progress.advance, found=progress.found)
        return fetch_fasta(source, folder, fetcher, progress.expect)


def _describe(summary: "Summary", max_length: int) -> str:
    return (
        f"{summary.n_genes:,} genes, width {summary.width:,}, from {summary.n_proteins:,} proteins "
        f"({summary.n_sequences:,} different sequences); {summary.n_cut:,} cut to {max_length:,} residues, "
        f"{summary.n_replaced:,} letters replaced by <unk>; {summary.n_computed:,} sequences computed in "
        f"{summary.seconds:.1f} s ({summary.n_computed / summary.seconds:.1f} per second)"
    )


def _describe_similarities(found: "Similarities") -> str:
    return (
        f"{found.n_shared:,} genes in common; cosine similarities: minimum {found.minimum:.6f}, "
        f"median {found.median:.6f}, mean {found.mean:.6f}"
    )
