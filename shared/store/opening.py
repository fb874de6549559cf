"""A store by its URL: `file:///var/lib/captune`, or `s3://bucket/prefix`."""

import fsspec
from fsspec.implementations.local import LocalFileSystem

from shared.store.disk import DiskStore
from shared.store.object_store import ObjectStore
from shared.store.storage import Store


def open_store(url: str) -> Store:
    fs, root = fsspec.core.url_to_fs(url, use_listings_cache=False)
    return DiskStore(root) if isinstance(fs, LocalFileSystem) else ObjectStore(fs, root)
