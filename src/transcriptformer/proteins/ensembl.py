"""Proteins of a species from Ensembl, by the manifest in `protein_embeddings/`."""

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
from transcriptformer.fetching.fetcher import DamagedFileError, Fetcher, alone
from transcriptformer.fetching.http import HttpFile
from transcriptformer.proteins.fasta import read_proteins

logger = logging.getLogger(__name__)

MANIFEST = "protein_embeddings/ensembl.yaml"

ADDRESS_VARIABLE = "TRANSCRIPTFORMER_ENSEMBL"
"""Environment variable that moves the address of the servers, to a mirror with the same paths."""


@dataclass(frozen=True)
class FastaSource:
    """Where the proteins of a species are.

    Attributes
    ----------
    organism_key
        Latin name in lower case, with underscores.
    url
        Of the gzipped FASTA file.
    """

    organism_key: str
    url: str

    @property
    def filename(self) -> str:
        """The last part of the address."""
        return self.url.rpartition("/")[2]


def fasta_source(organism_key: str) -> FastaSource:
    """Look a species up in the manifest.

    Raises
    ------
    UsageError
        If it is not there.
    """
    manifest: Any = OmegaConf.to_container(OmegaConf.load(shipped_file(MANIFEST)))
    place = manifest["elsewhere"].get(organism_key)
    if place:
        raise UsageError(f"--organism-key {organism_key}: not on Ensembl; fetch proteins from {place} and give --fasta")
    if organism_key not in manifest["species"]:
        raise UsageError(
            f"--organism-key {organism_key}: not in {shipped_file(MANIFEST)}, which has "
            f"{', '.join(manifest['species'])}; for any other species, give --fasta"
        )
    entry = manifest["species"][organism_key]
    division = manifest["divisions"][entry["division"]]
    address = os.environ.get(ADDRESS_VARIABLE, division["address"]).rstrip("/")
    folder, _, _ = entry["file"].partition(".")
    return FastaSource(organism_key, f"{address}/{division['path']}/{folder.lower()}/pep/{entry['file']}.pep.all.fa.gz")


def fetch_fasta(
    source: FastaSource, folder: Path, fetcher: Fetcher, started: Callable[[int], object] = lambda n_bytes: None
) -> Path:
    """Bring the file to the folder, unless it is there; only a whole one, which can be read, gets its name.

    Parameters
    ----------
    started
        Called with the file's size when it begins to come.

    Raises
    ------
    DownloadError
        If it cannot be had. What came of it stays for the next try.
    """
    target = folder / source.filename
    with alone(folder / f".{source.filename}.lock"):
        if target.exists():
            logger.info("%s: there already", target)
        else:
            with closing(HttpFile(source.url)) as remote:
                started(fetcher.patiently(remote.stat, 0).size)
                fetcher.fetch(remote, target, _look_into)
    return target


def _look_into(path: Path) -> int:
    """How many proteins there are; gzip's own checksum is compared on the way."""
    try:
        return len(read_proteins(path))
    except DataError as error:
        raise DamagedFileError(str(error)) from error
