"""kill -9 at random moments: the same command, run again, gives the same bytes and leaves nothing behind."""

import os
import random
import shutil

import pytest
from commands import COMMANDS
from runs import Runner, contents, differences


def check_kills(command, count, server, inputs, tmp_path, seed=0):
    """Returns, for each kill, when it was, what the command ended with, and what the next run ended with."""
    argv = command.argv(inputs)

    def fresh(name):
        (tmp_path / name).mkdir()
        return Runner(server, inputs, tmp_path / name, argv)

    first = fresh("reference")
    code, said, _ = first.run()  # compiles
    assert code == 0, said
    expected = contents(first.folder)
    shutil.rmtree(first.folder)
    first = fresh("reference")
    code, said, seconds = first.run()
    assert code == 0, said
    assert differences(contents(first.folder), expected) == [], "two runs differ"
    shutil.rmtree(first.folder)
    rng, report = random.Random(f"{command.name} {seed}"), []
    for number in range(count):
        killed = fresh(f"killed{number}")
        moment = rng.random() * seconds
        how = killed.run(stop_after=moment)[0]
        code, said, _ = killed.run()
        done = command.then_refused and code == 65
        different = differences(contents(killed.folder), expected)
        left = sorted(path.name for path in server.scratch.iterdir())
        for path in left:
            shutil.rmtree(server.scratch / path, ignore_errors=True)
        report.append((round(moment, 2), how, code))
        assert (code == 0 or done) and not different and not left, (moment, how, code, said, different, left)
        shutil.rmtree(killed.folder)
    return seconds, report


@pytest.mark.parametrize("command", [each for each in COMMANDS if each.few], ids=str)
def test_kill_and_run_again(command, server, inputs, tmp_path):
    check_kills(command, 2, server, inputs, tmp_path)


@pytest.mark.soak
@pytest.mark.parametrize("command", COMMANDS, ids=str)
def test_kill_and_run_again_long(command, server, inputs, tmp_path):
    seconds, report = check_kills(command, int(os.environ.get("LSG_KILLS", "20")), server, inputs, tmp_path, seed=1)
    print(f"\n{command}: {seconds:.1f} s, {len(report)} kills: {report}", flush=True)
