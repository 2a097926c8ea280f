import io

from m2t_accel.config.fields import ConfigurationError
from m2t_accel.doctor import findings as module
from m2t_accel.doctor.findings import BAD, DOUBTFUL, GOOD, Finding, Findings
from m2t_accel.output import lasting_output


def test_a_check_that_raises_becomes_a_line_and_the_others_still_run(capsys):
    def refuses():
        yield Finding(GOOD, "first", "was found")
        raise ConfigurationError("--epochs 0: give more")

    def breaks():
        raise ZeroDivisionError("division by zero")

    findings = Findings(is_main=True)
    findings.start_group("things")
    findings.check("second", refuses)
    findings.check("third", breaks)
    findings.check("fourth", lambda: [Finding(DOUBTFUL, "fourth", "is odd")])
    assert capsys.readouterr().out.splitlines() == [
        "things",
        "  ✓ first          was found",
        "  ✗ second         --epochs 0: give more",
        "  ✗ third          ZeroDivisionError: division by zero",
        "  ! fourth         is odd",
    ]
    assert findings.names(BAD) == ["second", "third"]
    assert findings.as_rows()[3] == {"group": "things", "mark": DOUBTFUL, "name": "fourth", "text": "is odd"}


def test_a_terminal_without_the_marks_gets_letters(monkeypatch):
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr("sys.stdout", stream)
    with lasting_output():
        findings = Findings(is_main=True)
        findings.start_group("things")
        findings.add(Finding(BAD, "size", "2 × 3"))
    assert stream.buffer.getvalue() == b"things\n  x size           2 ? 3\n"


def test_only_the_first_process_checks_and_prints(capsys):
    findings = Findings(is_main=False)
    findings.start_group("things")
    findings.check("never", lambda: 1 / 0)
    assert capsys.readouterr().out == ""


def test_bytes_are_in_words():
    assert [module.gigabytes(n) for n in (12, 27e6, 3.61e9, 250e9, 1.5e12)] == [
        *("12 bytes", "27 MB", "3.61 GB", "250 GB", "1.5 TB")
    ]
