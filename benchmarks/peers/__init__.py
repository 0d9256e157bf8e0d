"""`make bench`: the served model against other libraries with the same weights, in turn on the same machine.

- `__main__`: one run, from the checkpoint to the table.
- `checkpoint`: random weights in the published layout.
- `peer`: the libraries, and the processes that measure them.
- `machine`: what the machine could reach.
- `report`: the table, the JSON and the picture.
- `drivers/`: a module for each library, which its own environment runs.
"""
