"""One process per node that starts and watches the workers and owns the vault.

`launcher` is the command line, `node` the process's main loop, `round` what the leader decides;
`link` and `shelf` are the worker's side.
"""
