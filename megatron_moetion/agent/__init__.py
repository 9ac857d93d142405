"""One process per node that starts and watches the workers and owns the vault.

`launcher` is the command line, `node` the process's main loop; `link` is the only module a worker needs.
"""
