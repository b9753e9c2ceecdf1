"""Ranks that each observe a share of a round hold the table of one process, bit for bit."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from test_engine_from_spec import Script, make_pool, rows_of, same_state, samples

import lead_fast as lf
from lead_fast.ranks import Ranks, observations_of

ROUNDS = 25
OPTIONS = {"budget": 1.0, "max_uses": 3, "rate": 0.1, "min_rounds": 15}


def play(engine, script, rank=0, world=1):
    """Plays the script's rounds, of each step's micro-batches those of one rank; returns what was chosen and reported."""
    engine.shadow(["none", "historical", "grad_norm"])
    engine.record_visits = True
    engine.track(script.weights)
    out = []
    for _ in range(ROUNDS):
        rnd = engine.begin_round()
        for step in script.round(rnd.number, rnd.rows.tolist()):
            for batch in step.batches[rank::world]:
                rows, found = rows_of(batch), samples(batch)
                engine.observe(rows, found)
                rows.fill_(-1)  # the caller's buffers are the caller's again
                for column in found:
                    column.fill_(torch.nan)
            script.move_weights(rnd.number, step.lr)
            engine.step(lr=step.lr, num_items=step.num_items)
        report = engine.end_round()
        visits = {name: column.tolist() for name, column in report.visits.items()}
        out.append(repr((rnd.rows.tolist(), report.reward, report.num_samples, report.quarantined, report.calibration, visits)))
    return out


def rank_main(rank, world, folder, options):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    pool, utility = make_pool()
    engine = lf.LeadEngine(pool, lf.LeadConfig(**OPTIONS | options), group=dist.group.WORLD)
    reports = play(engine, Script(utility), rank, world)
    torch.save({"reports": reports, "state": engine.state_dict()}, Path(folder) / f"rank{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize(("world", "options"), [(2, {}), (3, {"preset": "paper", "estimator": "historical"})])
def test_ranks_hold_the_table_of_one_process(world, options, tmp_path):
    pool, utility = make_pool()
    engine = lf.LeadEngine(pool, lf.LeadConfig(**OPTIONS | options))
    reports = play(engine, Script(utility))
    context = mp.spawn(rank_main, (world, str(tmp_path), options), nprocs=world, join=False)
    assert context is not None
    while not context.join(timeout=60):
        pass
    for rank in range(world):
        got = torch.load(tmp_path / f"rank{rank}.pt", weights_only=True)
        assert got["reports"] == reports
        assert same_state(got["state"], engine.state_dict())


def disagreeing_main(rank, world, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    ranks = Ranks.started("cpu")
    assert (ranks.number, ranks.world, ranks.is_first) == (rank, world, rank == 0)
    assert ranks.share([10, 11, 12, 13, 14]) == [[10, 13], [11, 14], [12]][rank]
    assert [ranks.idles([10] * n) for n in (3, 4, 5)] == [False, rank > 0, rank > 1]
    assert [ranks.any(rank == 2), ranks.any(False), ranks.of_first(7 + rank)] == [True, False, 7]
    assert ranks.gather({"rank": rank}) == [{"rank": r} for r in range(world)]
    ranks.agree("the seed", 5)
    with pytest.raises(RuntimeError, match=r"the 3 processes must agree on the rows of round 4, got \[0, 1, 2\]"):
        ranks.agree("the rows of round 4", rank)
    dist.destroy_process_group()


def test_ranks_share_work_and_notice_when_they_disagree(tmp_path):
    mp.spawn(disagreeing_main, (3, str(tmp_path)), nprocs=3)
    alone = Ranks.started("cpu")
    assert alone.world == 1 and alone.share([1, 2]) == [1, 2] and not alone.idles([1]) and alone.gather(3) == [3]
    alone.agree("anything", 1)


def test_observations_keep_their_ranks_in_a_file_that_sorts_by_name():
    """As a checkpoint has them: "10" before "2"."""
    parts = {str(rank): torch.tensor([[0.0, 0.0, rank, 1.0, 1.0, 1.0]], dtype=torch.float64) for rank in range(12)}
    read = dict(sorted(parts.items()))
    assert list(read) != list(parts)
    assert [int(o.rows) for o in observations_of(read, torch.device("cpu"))] == list(range(12))
