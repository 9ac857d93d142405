"""The demo's data set."""

import importlib.util
from pathlib import Path

import pytest

pytest.importorskip("megatron.core", reason="the data set has the host's format")

PATH = Path(__file__).parents[3] / "launch" / "demo" / "corpus.py"


@pytest.fixture(scope="module")
def corpus():
    spec = importlib.util.spec_from_file_location("demo_corpus", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def library(tmp_path):
    folder = tmp_path / "lib"
    (folder / "test").mkdir(parents=True)
    (folder / "b.py").write_bytes(b"second")
    (folder / "a.py").write_bytes(b"first")
    (folder / "test" / "c.py").write_bytes(b"left out")
    return folder


def test_documents_come_sorted_and_without_tests(corpus, library):
    assert list(corpus.documents(library, 100)) == [b"first", b"second"]


def test_the_size_is_bounded(corpus, library):
    assert list(corpus.documents(library, 7)) == [b"first", b"se"]


def test_the_host_reads_back_the_bytes(corpus, library, tmp_path):
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    prefix = tmp_path / "out" / "text"
    assert corpus.write(prefix, library, 100) == len(b"first") + len(b"second") + 2
    dataset = IndexedDataset(str(prefix))
    assert [list(dataset[index]) for index in range(2)] == [
        [*b"first", corpus.END_OF_DOCUMENT],
        [*b"second", corpus.END_OF_DOCUMENT],
    ]
    assert sorted(path.name for path in prefix.parent.iterdir()) == ["text.bin", "text.idx"]
