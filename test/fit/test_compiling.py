"""The trial of ``torch.compile``, of which a stand-in takes the place."""

import dataclasses

import pytest
import torch
from helpers.steps import parameters, some_batch
from helpers.workspaces import QUICK

from ichseg.errors import TrainingError
from training.fit import compiling
from training.fit.compiling import forward_of
from training.fit.fold_run import open_run
from training.fit.process_group import ProcessGroup
from training.fit.step import begin, memory_advice, train_step
from training.jobs.train import run_fold


def test_what_cannot_be_compiled_is_trained_as_it_is(fresh, monkeypatch, caplog):
    config = dataclasses.replace(QUICK, compile=True)
    run = open_run(fresh, "3d_fullres", "0", config)
    network = begin(run).network

    def no_compiler(_):
        def forward(_):
            raise RuntimeError("\nno C++ compiler found\nmore lines")

        return forward

    monkeypatch.setattr(torch, "compile", no_compiler)
    assert forward_of(run, network) is network
    assert "torch.compile failed (no C++ compiler found); training goes on WITHOUT" in caplog.text
    assert run_fold(fresh, "3d_fullres", "0", config)


def test_a_compiled_network_is_used_and_its_trial_leaves_no_trace(fresh, monkeypatch):
    config = dataclasses.replace(QUICK, compile=True)
    run = open_run(fresh, "3d_fullres", "0", config)
    calls = []

    def fake(network):
        def forward(data):
            calls.append((tuple(data.shape), network.training))
            return network(data)

        return forward

    monkeypatch.setattr(torch, "compile", fake)
    plain, compiled = begin(run), begin(run)
    compiled.forward = forward_of(run, compiled.network)
    shape = (run.spec.batch, 1, *run.spec.patch)
    assert calls == [(shape, True), (shape, False)]
    for state in (plain, compiled):
        train_step(run, state, some_batch())
    assert len(calls) == 3
    assert torch.equal(parameters(plain), parameters(compiled))


@pytest.mark.parametrize("another", [False, True])
def test_processes_compile_all_or_none(fresh, monkeypatch, caplog, another):
    """A compiled network has a gradient of 0 where another one has none."""
    run = open_run(fresh, "3d_fullres", "0", dataclasses.replace(QUICK, compile=True))
    run = dataclasses.replace(run, group=ProcessGroup(0, 2))
    network = begin(run).network
    monkeypatch.setattr(torch, "compile", lambda network: lambda data: network(data))
    monkeypatch.setattr(ProcessGroup, "any", lambda _, mine: (mine or another,))
    assert (forward_of(run, network) is network) == another
    assert ("torch.compile is NOT used: another process" in caplog.text) == another


@pytest.mark.parametrize(("gain", "used"), [(1.5, True), (1.01, False), (0.7, False)])
def test_left_to_a_trial_the_faster_network_is_used(fresh, monkeypatch, caplog, gain, used):
    """The CPU stands in for a GPU; what a step takes is made up."""
    caplog.set_level("INFO")
    run = open_run(fresh, "3d_fullres", "0", QUICK)
    network = begin(run).network
    assert forward_of(run, network) is network  # no trial on the CPU

    def faster(data):
        return network(data)

    zeros = compiling._zeros(run)
    monkeypatch.setattr(torch, "compile", lambda _: faster)
    monkeypatch.setattr(compiling, "_zeros", lambda _: zeros)
    monkeypatch.setattr(
        compiling,
        "_seconds",
        lambda run, network, forward, data: 0.01 if forward is faster else 0.01 * gain,
    )
    card = dataclasses.replace(run, device=torch.device("cuda"))
    assert (forward_of(card, network) is faster) == used
    assert ("torch.compile is NOT used, as it gains too little: 10.0 ms" in caplog.text) != used
    never = dataclasses.replace(card, config=dataclasses.replace(QUICK, compile=False))
    assert forward_of(never, network) is network
    repeatable = dataclasses.replace(card, config=dataclasses.replace(QUICK, deterministic=True))
    assert forward_of(repeatable, network) is network  # what is faster differs from run to run
    always = dataclasses.replace(card, config=dataclasses.replace(QUICK, compile=True))
    assert forward_of(always, network) is faster


@pytest.mark.parametrize("wanted", [None, True])
def test_a_trial_that_memory_does_not_suffice_for_ends_no_training(
    fresh, monkeypatch, caplog, wanted
):
    """Unless compiling was asked for: then the advice says how to do without."""
    config = dataclasses.replace(QUICK, compile=wanted)
    run = open_run(fresh, "3d_fullres", "0", config)
    network, zeros = begin(run).network, compiling._zeros(run)

    def too_large(data):
        network(data)[0].sum().backward()
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torch, "compile", lambda _: too_large)
    monkeypatch.setattr(compiling, "_zeros", lambda _: zeros)
    run = dataclasses.replace(run, device=torch.device("cuda"))
    if wanted:
        message = "out of memory on cuda .* try --gpu-cache no, --no-compile, "
        with pytest.raises(TrainingError, match=message), memory_advice(run):
            forward_of(run, network)
    else:
        assert forward_of(run, network) is network
        assert "failed (CUDA out of memory); training goes on WITHOUT it" in caplog.text
    assert all(parameter.grad is None for parameter in network.parameters())


def test_a_trial_measures_steps(fresh):
    run = open_run(fresh, "3d_fullres", "0", QUICK)
    network, calls = begin(run).network, []

    def forward(data):
        calls.append(1)
        return network(data)

    assert compiling._seconds(run, network, forward, compiling._zeros(run)) > 0
    assert len(calls) == compiling._WARM + compiling._TIMED
