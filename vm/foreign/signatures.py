"""The functions of WASI preview 1, with the types that its witx files give them.

Interface: `WASI_SIGNATURES`, by name, all 46. Pointers, sizes, descriptors and errors are i32;
offsets, timestamps and rights i64. Source: WASI/phases/snapshot/witx/wasi_snapshot_preview1.witx.
"""

from __future__ import annotations

from manifold.vm.foreign.binary import Signature

WASI_MODULE = "wasi_snapshot_preview1"

# A letter a parameter: i an i32, l an i64. Each leaves an error number, but proc_exit.
_PARAMETERS = {
    "args_get": "ii",
    "args_sizes_get": "ii",
    "environ_get": "ii",
    "environ_sizes_get": "ii",
    "clock_res_get": "ii",
    "clock_time_get": "ili",
    "fd_advise": "illi",
    "fd_allocate": "ill",
    "fd_close": "i",
    "fd_datasync": "i",
    "fd_fdstat_get": "ii",
    "fd_fdstat_set_flags": "ii",
    "fd_fdstat_set_rights": "ill",
    "fd_filestat_get": "ii",
    "fd_filestat_set_size": "il",
    "fd_filestat_set_times": "illi",
    "fd_pread": "iiili",
    "fd_prestat_get": "ii",
    "fd_prestat_dir_name": "iii",
    "fd_pwrite": "iiili",
    "fd_read": "iiii",
    "fd_readdir": "iiili",
    "fd_renumber": "ii",
    "fd_seek": "ilii",
    "fd_sync": "i",
    "fd_tell": "ii",
    "fd_write": "iiii",
    "path_create_directory": "iii",
    "path_filestat_get": "iiiii",
    "path_filestat_set_times": "iiiilli",
    "path_link": "iiiiiii",
    "path_open": "iiiiillii",
    "path_readlink": "iiiiii",
    "path_remove_directory": "iii",
    "path_rename": "iiiiii",
    "path_symlink": "iiiii",
    "path_unlink_file": "iii",
    "poll_oneoff": "iiii",
    "proc_exit": "i",
    "proc_raise": "i",
    "sched_yield": "",
    "random_get": "ii",
    "sock_accept": "iii",
    "sock_recv": "iiiiii",
    "sock_send": "iiiii",
    "sock_shutdown": "ii",
}
WASI_SIGNATURES = {
    name: Signature(
        tuple("i32" if letter == "i" else "i64" for letter in letters),
        () if name == "proc_exit" else ("i32",),
    )
    for name, letters in _PARAMETERS.items()
}
