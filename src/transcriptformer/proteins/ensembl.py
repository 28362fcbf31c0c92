"""Download the proteins of a species from Ensembl, as listed in `protein_embeddings/ensembl.yaml`."""

import logging
import os
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from transcriptformer.config import shipped_file
from transcriptformer.errors import DataError, UsageError
from transcriptformer.fetching.fetcher import DamagedFileError, Fetcher, exclusive_lock
from transcriptformer.fetching.http import HttpFile
from transcriptformer.proteins.fasta import read_proteins

logger = logging.getLogger(__name__)

MANIFEST = "protein_embeddings/ensembl.yaml"

ADDRESS_VARIABLE = "TRANSCRIPTFORMER_ENSEMBL"
"""Environment variable with the address of a mirror that has the same paths."""


@dataclass(frozen=True)
class FastaSource:
    """The FASTA file of a species.

    Attributes
    ----------
    organism_key
        Latin name in lower case, with underscores.
    url
        URL of the gzipped file.
    """

    organism_key: str
    url: str

    @property
    def filename(self) -> str:
        """Last component of the URL."""
        return self.url.rpartition("/")[2]


def fasta_source(organism_key: str) -> FastaSource:
    """Look up a species in the manifest.

    Raises
    ------
    UsageError
        If the manifest has no such species.
    """
    manifest: Any = OmegaConf.to_container(OmegaConf.load(shipped_file(MANIFEST)))
    other_source = manifest["elsewhere"].get(organism_key)
    if other_source:
        raise UsageError(
            f"--organism-key {organism_key}: not on Ensembl; download proteins from {other_source} and use --fasta"
        )
    if organism_key not in manifest["species"]:
        raise UsageError(
            f"--organism-key {organism_key}: not in {shipped_file(MANIFEST)}, which has "
            f"{', '.join(manifest['species'])}; for any other species, use --fasta"
        )
    entry = manifest["species"][organism_key]
    division = manifest["divisions"][entry["division"]]
    address = os.environ.get(ADDRESS_VARIABLE, division["address"]).rstrip("/")
    folder, _, _ = entry["file"].partition(".")
    return FastaSource(organism_key, f"{address}/{division['path']}/{folder.lower()}/pep/{entry['file']}.pep.all.fa.gz")


def fetch_fasta(
    source: FastaSource, folder: Path, fetcher: Fetcher, started: Callable[[int], object] = lambda n_bytes: None
) -> Path:
    """Download the file into the folder, unless it exists; it appears there only when complete and valid.

    Parameters
    ----------
    started
        Called with the size of the file before the download.

    Raises
    ------
    DownloadError
        If the download fails; the partial file is kept, and the next attempt resumes from it.
    """
    target = folder / source.filename
    with exclusive_lock(folder / f".{source.filename}.lock"):
        if target.exists():
            logger.info("%s: already downloaded", target)
        else:
            with closing(HttpFile(source.url)) as remote:
                started(fetcher.with_retries(remote.stat, 0).size)
                fetcher.fetch(remote, target, _count_proteins)
    return target


def _count_proteins(path: Path) -> int:
    """Count the proteins of a downloaded file, which validates it, gzip's checksum included."""
    try:
        return len(read_proteins(path))
    except DataError as error:
        raise DamagedFileError(str(error)) from error
