"""Importers: what people have on disk becomes a manifest and instructions (docs/corpora.md)."""
