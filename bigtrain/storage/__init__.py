"""Files on local disks, servers and object stores, with their hashes and locks.

| file | contents |
|---|---|
| files.py | atomic writes of local files |
| lines.py | JSON-lines files that remain readable after an incomplete write |
| hashes.py | hashes, prefixed with the name of their algorithm |
| locks.py | flock |
| objects.py | files on servers and object stores, with retries |
| scheme.py | URL schemes, an extension point |
| schemes/ | one file for each built-in scheme |
"""

from bigtrain.storage.files import fsync_directory, fsync_file, write_atomic, write_json
from bigtrain.storage.hashes import hash_bytes, hash_file, hash_text
from bigtrain.storage.lines import LineLog, append_line, cut_lines, read_lines

__all__ = [
    "LineLog",
    "append_line",
    "cut_lines",
    "fsync_directory",
    "fsync_file",
    "hash_bytes",
    "hash_file",
    "hash_text",
    "read_lines",
    "write_atomic",
    "write_json",
]
