"""How the processes of a stage hold its model. Imports nothing, as the configuration names these."""

SHARDED = ("fsdp2", "deepspeed_zero3")  # modes of `launch` in which each process holds a share of the model
