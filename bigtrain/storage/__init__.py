"""Files: on local disks, as JSON lines, on object stores; their hashes and locks.

| file | what it holds |
|---|---|
| files.py | local files that are there whole or not at all |
| lines.py | JSON-lines files that survive a torn tail |
| hashes.py | hashes with the name of their algorithm |
| locks.py | flock |
| objects.py | files on servers and object stores, with retries |
| scheme.py | the schemes of URLs: an extension point |
| schemes/ | one file for each of bigtrain's own schemes |
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
