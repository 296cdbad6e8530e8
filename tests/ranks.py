"""Two processes that are the ranks of one group."""

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def on_two_ranks(work, folder):
    """What `work(rank, folder)` returns on each. They meet at a file: a port that was free when it
    was asked for may be another test's by the time it is bound."""
    mp.spawn(run_rank, args=(work, str(folder)), nprocs=2)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


def run_rank(rank, work, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    torch.save(work(rank, folder), f"{folder}/{rank}.pt")  # and what holds the group is gone
    dist.destroy_process_group()
