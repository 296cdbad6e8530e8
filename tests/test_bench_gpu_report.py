"""Clocks, plan, claims, floors and summary of `bench gpu`."""

import sys
from dataclasses import replace

import pytest
from bench_results import result

from bench.gpu import claims, clocks, device, plan, predict, speed, summary, timing
from bench.gpu.outcome import FAILED, LEFT_OUT, PASSED, Found
from bench.gpu.sizes import REHEARSED
from bench.gpu.stand_in import StandIn
from bench.targets import TARGETS


def nvidia_smi(folder, monkeypatch, answer, known="clocks_event_reasons"):
    path = folder / "nvidia-smi"
    refused = 'echo "Field is not a valid field to query."; exit 2'
    wanted = f'case "$1" in *{known}*) echo "{answer}";; *) {refused};; esac'
    path.write_text(f"#!/bin/sh\n{wanted}\n")
    path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    monkeypatch.setitem(sys.modules, "pynvml", None)  # cannot be imported


@pytest.mark.parametrize("known", ["clocks_event_reasons", "clocks_throttle_reasons", "clocks.sm"])
def test_clocks_by_nvidia_smi(tmp_path, monkeypatch, known):
    answer = "1980, 2619, 312.45, 51"
    answer += "" if known == "clocks.sm" else ", 0x0000000000000024"
    nvidia_smi(tmp_path, monkeypatch, answer, known)
    read = clocks.sensor()
    reading = read()
    assert reading["clock"] == 1980
    assert reading["power"] == 312.45
    assert reading.get("reasons", 0x24) == 0x24


def test_unknown_clocks_are_said_to_be(tmp_path, monkeypatch):
    nvidia_smi(tmp_path, monkeypatch, "[N/A], [N/A], [N/A], [N/A], [N/A]")
    assert clocks.sensor() is None
    monkeypatch.setenv("PATH", str(tmp_path / "nowhere"))
    assert clocks.sensor() is None
    watch = clocks.Watch(None)
    assert watch.between(0, 1e9) == {}
    assert clocks.shown({}) == "clock, power and temperature unknown"


def test_throttling_during_a_check_is_noticed():
    watch = clocks.Watch(None)
    base = {"memory_clock": 2619.0, "power": 300.0, "temperature": 50.0, "reasons": 1}
    watch.readings = [
        (1.0, {**base, "clock": 345.0}),
        (2.0, {**base, "clock": 1980.0}),
        (3.0, {**base, "clock": 1500.0, "power": 700.0, "reasons": 0x4}),
        (4.0, {**base, "clock": 1950.0, "reasons": 0x20}),
        (5.0, {**base, "clock": 345.0}),
    ]
    found = watch.between(1.5, 4.5)
    assert found["clock"] == 1950
    assert found["least_clock"] == 1500
    assert found["power"] == 700
    assert found["throttled"] == "power cap, thermal slowdown"
    assert clocks.shown(found) == ("1950 MHz, 700 W, 50 °C, THROTTLED: power cap, thermal slowdown")
    assert "throttled" not in watch.between(4.9, 5.5)
    assert watch.between(4.2, 4.3)["clock"] == 1950  # none then: the one before


def test_a_sensor_that_breaks_ends_nothing():
    def read():
        raise OSError("the device is lost")

    watch = clocks.Watch(None)
    watch.read = read
    watch.take()
    assert watch.readings == []


# ---- the plan ------------------------------------------------------------------------------------


@pytest.mark.parametrize("minutes", [1, 3, 10, 30])
def test_what_fits(minutes):
    every = plan.every()
    chosen, others = plan.fitting(every, minutes)
    assert {x.name for x in chosen} | {x.name for x in others} == {x.name for x in every}
    stages = {x.stage for x in chosen}
    assert {"rates", "correctness", "speed"} <= stages
    assert {x.name for x in every if x.stage == "rates"} <= {x.name for x in chosen}
    taken = sum(x.cost / plan.LANES[x.stage] for x in chosen)
    assert taken <= 60 * minutes * plan.RESERVE
    if minutes >= 10:  # every claim's problem, everything of the first tiers, every stage's start
        assert all(x in chosen for x in every if x.tier <= plan.CORE)
        assert stages >= {"reruns", "predictions"}
    if minutes == 30:
        assert not others
    ends = plan.deadlines(chosen, 100.0, minutes)
    assert list(ends.values()) == sorted(ends.values())
    assert ends["sanitizer"] == pytest.approx(100 + 60 * minutes)


def test_more_time_runs_more():
    every = plan.every()
    sizes = [len(plan.fitting(every, m)[0]) for m in (1, 3, 10, 30)]
    assert sizes == sorted(set(sizes))


def test_stages_follow_one_another_and_a_tier_its_betters():
    for rehearsal in (False, True):
        every = plan.every(rehearsal)
        assert [plan.STAGES.index(x.stage) for x in every] == sorted(
            plan.STAGES.index(x.stage) for x in every
        )
        assert {x.stage for x in every} == set(plan.STAGES)


# ---- claims --------------------------------------------------------------------------------------


def test_every_claim_is_measured_in_ten_minutes():
    chosen, _ = plan.fitting(plan.every(), 10)
    names = {x.name for x in chosen}
    for claim in claims.CLAIMS:
        assert f"speed: {claim.case}, {claim.dtype}, {claim.n}×{claim.d}" in names
    assert len({x.name for x in claims.CLAIMS}) == len(claims.CLAIMS)


def known(**others):
    graph = result("ours, graph", n=64, p50=5e-6)
    ours = result("ours", n=64, p50=50e-6, wall=120e-6)
    results = [replace(x, dtype="bf16") for x in (graph, ours)]
    return claims.Known(results=results, **others)


def verdict_of(name, found):
    (claim,) = (x for x in claims.CLAIMS if x.name == name)
    return claims.judged(claim, found)


def test_verdicts():
    found = verdict_of("RKDO 64×64: in a CUDA graph", known())
    assert (found.word, found.detail) == ("held", "5 µs, ≤ 6 µs wanted")
    found = verdict_of("RKDO 64×64: a call", known())
    assert (found.word, found.detail) == ("missed", "by 3.00 ×: 120 µs, ≤ 40 µs wanted")
    found = verdict_of("RKDO 65536×64: time", known())
    assert (found.word, found.detail) == ("not measured", "ours was not run")
    clip = [
        replace(result(who, n=65536, p50=p), case="clip", d=512, dtype="bf16", status=s)
        for who, p, s in (("ours", 0.05, "ok"), ("inf-cl", 0.3, "ok"), ("inf-cl", None, "oom"))
    ]
    name = "CLIP 65536×512 against Inf-CL"
    found = verdict_of(name, claims.Known(results=clip[:2]))
    assert (found.word, found.detail) == ("missed", "by 1.33 ×: 6.00 ×, ≥ 8.00 × wanted")
    found = verdict_of(name, claims.Known(results=clip))
    assert (found.word, found.detail) == ("not measured", "inf-cl: oom, ")


def test_a_fields_share_of_the_bandwidth():
    name = "dense field in bf16, 16384×64: of a copy's bandwidth"
    ours = result("ours", n=16384, p50=4 * 16384**2 / 3e12)
    ours = replace(ours, case="field_dense_bf16", dtype="bf16")
    found = verdict_of(name, claims.Known(results=[ours]))
    assert found.detail == "the bandwidth of a copy was not measured"
    found = verdict_of(name, claims.Known(results=[ours], rates={"memory": 3.2e12}))
    assert (found.word, found.detail) == ("held", "0.94, ≥ 0.85 wanted")


def test_a_failed_check_misses_its_stages_claim():
    fine = Found("a", "correctness", PASSED)
    left = Found("c", "correctness", LEFT_OUT, "no time")
    assert claims.of_checks("correctness", [fine, left]).word == "held"
    failed = Found("b", "correctness", FAILED)
    assert claims.of_checks("correctness", [fine, failed]).word == "missed"
    nothing = claims.of_checks("correctness", [left])
    assert (nothing.word, nothing.detail) == ("not measured", "no time")


# ---- the summary, floors and predictions ---------------------------------------------------------


def test_a_kernels_own_time_stands_beside_its_prediction():
    figures = {"host": 30e-6, "launches": 3.0, "kernel _moments_fwd": 12e-6, "kernel other": 1e-6}
    found = [
        Found("kernels: rkdo_loss, bf16, 4096×64", "speed", PASSED, figures=figures,
              sensors={"clock": 1980.0}),
        Found("predicted: rkdo_loss, bf16, d=64", "predictions", PASSED,
              figures={"kernel _moments_fwd": 10e-6 / 4096**2}),
    ]  # fmt: skip
    text = "\n".join(summary.kernels(found))
    assert "host 30 µs, 3 launches (1980 MHz)" in text
    assert "_moments_fwd: 12 µs, 10 µs predicted, 1.20 ×" in text
    assert "other: 1 µs\n" in text + "\n"


def test_verdicts_come_last_and_throttling_is_told():
    run = summary.Run(known(), rehearsal=False)
    run.known.found.append(Found("a", "speed", PASSED, sensors={"throttled": "power cap"}))
    text = summary.markdown(run)
    assert "- power cap, during 1 checks" in text
    verdicts = text.split("## Verdicts")[1]
    assert "MISSED: RKDO 64×64: a call: by 3.00 ×" in verdicts
    assert "##" not in verdicts


def test_measured_rates_take_the_place_of_a_tables(monkeypatch):
    monkeypatch.setattr(device, "CURRENT", [StandIn()])
    work = timing.Work(products=5, exponentials=3)
    monkeypatch.setattr(timing, "RATES", {})
    table = timing.floor_seconds(work, 4096, 512, "bf16")
    assert table == pytest.approx(5 * 2 * 512 / 790e12 * 4096**2)
    monkeypatch.setattr(timing, "RATES", {"bf16": 400e12, "tf32": 200e12, "exp": 1e12})
    assert timing.floor_seconds(work, 4096, 512, "bf16") == pytest.approx(table * 790 / 400)
    assert timing.floor_seconds(work, 4096, 16, "bf16") == pytest.approx(3e-12 * 4096**2)
    assert timing.floor_seconds(work, 4096, 512, "fp32") == pytest.approx(
        5 * 2 * 512 * 3 / 200e12 * 4096**2
    )
    target = predict.with_rates(
        TARGETS["sm_90"], {"exp": 2.4e12, "memory": 3e12, "bf16": 1.0, "tf32": 2.0}, 100
    )
    assert target.clock == pytest.approx(2.4e12 / (100 * 16))
    assert (target.memory_rate, target.matrix) == (3e12, {"2": 1.0, "tf32": 2.0})


def test_the_rehearsals_sizes_are_small():
    assert len(plan.every(rehearsal=True)) < 100 < len(plan.every())
    assert max(x.n for x in speed.problems(REHEARSED)) <= 64
