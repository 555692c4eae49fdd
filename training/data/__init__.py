"""Text to train and measure on: any format, split, freed of duplicates, cut into windows.

A table (rows of a file) becomes a source (documents, each in a split). The inventory of all sources
says which texts are there twice; the reader gives what is left, by domain and split. Windows are
the tokens of documents, divided into context and what is scored.
"""

from training.data.documents import (
    MIN_DOCUMENTS,
    SPLITS,
    Document,
    Reader,
    Split,
    read_documents,
    require_documents,
    select,
    spread,
)
from training.data.reader import open_reader
from training.data.windows import Tokenizer, Window, WindowCutter

__all__ = [
    "MIN_DOCUMENTS",
    "SPLITS",
    "Document",
    "Reader",
    "Split",
    "Tokenizer",
    "Window",
    "WindowCutter",
    "open_reader",
    "read_documents",
    "require_documents",
    "select",
    "spread",
]
