"""Bytes on disk: headers, readers, the writer and its journal. Nothing here knows about models or methods."""
