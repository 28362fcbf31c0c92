"""Downloads of proteins from Ensembl by the manifest."""

import os
import re
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from tests.proteins.fasta_files import random_records, write_fasta
from tests.web import Web, serve
from transcriptformer.config import shipped_file
from transcriptformer.errors import DownloadError, UsageError
from transcriptformer.fetching import fetcher
from transcriptformer.fetching.fetcher import Fetcher
from transcriptformer.proteins.ensembl import ADDRESS_VARIABLE, MANIFEST, fasta_source, fetch_fasta

PATH = "/pub/release-113/fasta/homo_sapiens/pep/Homo_sapiens.GRCh38.pep.all.fa.gz"
FILE = "Homo_sapiens.GRCh38.pep.all.fa.gz"

IN_THE_MANIFEST = list(OmegaConf.load(shipped_file(MANIFEST)).species)


@pytest.fixture
def content(tmp_path: Path) -> bytes:
    return write_fasta(tmp_path / "made.fa.gz", random_records(f"ENSG{i:011}" for i in range(500))).read_bytes()


@pytest.fixture
def web(content: bytes, monkeypatch: pytest.MonkeyPatch) -> Iterator[Web]:
    monkeypatch.setattr(fetcher, "INITIAL_BACKOFF", 0.001)
    with serve(Web({PATH: content})) as web:
        monkeypatch.setenv(ADDRESS_VARIABLE, web.address)
        yield web


def visible(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if not path.name.endswith(".lock"))


def test_the_species_of_the_published_embeddings_that_are_on_ensembl_are_in_the_manifest() -> None:
    assert len(IN_THE_MANIFEST) == 22
    some = ["homo_sapiens", "mus_musculus", "heterocephalus_glaber", "lytechinus_variegatus", "plasmodium_falciparum"]
    urls = [fasta_source(key).url for key in some]
    assert urls == [
        "https://ftp.ensembl.org/pub/release-113/fasta/homo_sapiens/pep/Homo_sapiens.GRCh38.pep.all.fa.gz",
        "https://ftp.ensembl.org/pub/release-113/fasta/mus_musculus/pep/Mus_musculus.GRCm39.pep.all.fa.gz",
        "https://ftp.ensembl.org/pub/release-113/fasta/heterocephalus_glaber_female/pep/"
        "Heterocephalus_glaber_female.Naked_mole-rat_maternal.pep.all.fa.gz",
        "https://ftp.ensemblgenomes.ebi.ac.uk/pub/metazoa/release-60/fasta/lytechinus_variegatus_gca018143015v1/pep/"
        "Lytechinus_variegatus_gca018143015v1.Lvar_3.0.pep.all.fa.gz",
        "https://ftp.ensemblgenomes.ebi.ac.uk/pub/protists/release-60/fasta/plasmodium_falciparum/pep/"
        "Plasmodium_falciparum.ASM276v2.pep.all.fa.gz",
    ]


@pytest.mark.parametrize("organism_key", IN_THE_MANIFEST)
def test_every_entry_of_the_manifest_gives_a_url_of_its_species(organism_key: str) -> None:
    url = fasta_source(organism_key).url
    pattern = r"https://ftp\.ensembl(genomes\.ebi\.ac\.uk|\.org)/pub/[\w/-]+/fasta/([a-z0-9_]+)/pep/([\w.-]+)\.pep\.all\.fa\.gz"
    match = re.fullmatch(pattern, url)
    assert match
    assert match[2].startswith(organism_key)
    assert match[3].lower().startswith(f"{match[2]}.")


def test_an_unknown_species_is_an_error() -> None:
    with pytest.raises(UsageError, match=r"homo_sapient: not in .*ensembl.yaml, which has homo_sapiens, .*use --fasta"):
        fasta_source("homo_sapient")
    with pytest.raises(
        UsageError, match=r"xenopus_laevis: not on Ensembl; download proteins from Xenbase .*use --fasta"
    ):
        fasta_source("xenopus_laevis")


def test_a_file_is_downloaded_once_and_then_found_without_a_network(web: Web, content: bytes, tmp_path: Path) -> None:
    place = tmp_path / "place"
    sizes: list[int] = []
    source = fasta_source("homo_sapiens")
    assert fetch_fasta(source, place, Fetcher(), sizes.append).read_bytes() == content
    n_requests = len(web.requests)
    assert fetch_fasta(source, place, Fetcher(), sizes.append).read_bytes() == content
    assert visible(place) == [FILE]
    assert sizes == [len(content)]
    assert len(web.requests) == n_requests


def first_byte(web: Web) -> int:
    """Return the first byte of the last successful request."""
    return int(web.ranges(PATH)[-1].removeprefix("bytes=").partition("-")[0])


def test_a_broken_connection_loses_only_data_in_transit(web: Web, content: bytes, tmp_path: Path) -> None:
    web.fault = lambda path, n: "reset" if n < 3 else ""
    fetched = fetch_fasta(fasta_source("homo_sapiens"), tmp_path / "place", Fetcher())
    assert fetched.read_bytes() == content
    assert first_byte(web) > len(content) / 2


def test_an_interrupted_download_is_resumed(web: Web, content: bytes, tmp_path: Path) -> None:
    web.fault = lambda path, n: "reset" if n < 2 else "503"
    with pytest.raises(DownloadError):
        fetch_fasta(fasta_source("homo_sapiens"), tmp_path / "place", Fetcher(retries=1))
    assert visible(tmp_path / "place") == [f"{FILE}.part", f"{FILE}.part.json"]
    web.fault = lambda path, n: ""
    fetched = fetch_fasta(fasta_source("homo_sapiens"), tmp_path / "place", Fetcher())
    assert fetched.read_bytes() == content
    assert first_byte(web) > len(content) / 3


@pytest.mark.parametrize("damage", ["cut", "flipped", "log-in page", "nucleotides"])
def test_an_incomplete_or_invalid_file_never_appears(damage: str, web: Web, content: bytes, tmp_path: Path) -> None:
    changed = bytearray(content)
    changed[len(content) // 2] ^= 255
    cdna = write_fasta(tmp_path / "cdna.fa.gz", [("P1 gene:G1", "ACGT" * 100)]).read_bytes()
    bodies = {"cut": content[:-100], "flipped": bytes(changed), "log-in page": b"<html>", "nucleotides": cdna}
    web.files[PATH] = bodies[damage]
    with pytest.raises(DownloadError, match=r"truncated or damaged|not FASTA|not proteins"):
        fetch_fasta(fasta_source("homo_sapiens"), tmp_path / "place", Fetcher())
    assert visible(tmp_path / "place") == []


def test_a_missing_url_is_an_error(web: Web, tmp_path: Path) -> None:
    with pytest.raises(DownloadError, match=r"Mus_musculus.GRCm39.pep.all.fa.gz: HTTP 404"):
        fetch_fasta(fasta_source("mus_musculus"), tmp_path / "place", Fetcher())


@pytest.mark.slow
def test_the_manifest_is_found_from_an_installed_wheel(tmp_path: Path) -> None:
    root = Path(__file__).parents[2]
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(tmp_path), str(root)]
    subprocess.run(build, check=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "installed")
    code = "from transcriptformer.proteins import ensembl as e; print(e.__file__, e.fasta_source('homo_sapiens').url)"
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "installed")}
    found = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True, env=environment, cwd=tmp_path
    )
    assert found.stdout.startswith(str(tmp_path / "installed"))
    assert found.stdout.rstrip().endswith(PATH)
