#!/usr/bin/env python3
"""paper.py - the paper's claims put to the test: from images to tables, charts and pictures.

    tests/paper.py [PROGRAM]        (default ./diffenc; `make paper`)

It trains the models that are to be compared, evaluates them on the same draws and writes OUT/results.md, in
which each line names the command that made it. Interrupted anywhere, the same command goes on: a training
resumes from its checkpoint, and what is done already is not done again.

Environment: SEEDS ("1 2 3"), STEPS (10000, of each training), MNIST_DIR (mnist; "digits" for the built-in
data), OUT (run-paper), LIMIT (test images of each bound, evenly over the split; 0, the default: all), REPEATS
(2, draws of time and noise for each of them), FINITE_LIMIT (100, test images of the bounds that visit all T
steps), SAMPLE_STEPS (250, of the sampled pictures), LAUNCH (what starts the program on several ranks, such as
"mpirun -n 2").
Exit status: 0, 1 when a command fails, 2 for wrong settings, 128 + N after signal N.
"""

import csv
import ctypes
import fcntl
import json
import math
import os
import shlex
import signal
import statistics
import struct
import subprocess
import sys
import time

PROGRAM = sys.argv[1] if len(sys.argv) > 1 else "./diffenc"
TERMS = ("recon", "latent", "diffusion", "total")
FINITE_STEPS = (10, 30, 100, 300, 1000)      # the T of the finite bounds
TRAINED_T, RATIOS = 100, ("1", "1.1")        # the trainings at finite T, and their w = sigma_Q^2/sigma_P^2
SIXTEENTHS = (1, 2, 4, 8)                    # of a training: there the counterterm is looked at
# Half the default's width, and the rate and momentum found for it: more than twice as fast, as there is much to train.
SMALL = ["--channels", "16", "--lr", "0.016", "--momentum", "0.95"]
SHOWN_TIMES = "0,0.4,0.5,0.6,0.7,0.8,0.9,1"  # most of what an encoder does happens late


class Failure(Exception):
    """Told in one line; the exit status is 1."""


def setting(name, default, smallest=None):
    text = os.environ.get(name) or default
    if smallest is None:
        return text
    if not text.isdigit() or int(text) < smallest:
        print(f"paper.py: {name}={text}: expected a whole number from {smallest}", file=sys.stderr)
        sys.exit(2)
    return int(text)


SEEDS = setting("SEEDS", "1 2 3").split()
STEPS = setting("STEPS", "10000", 1)
DATA = setting("MNIST_DIR", "mnist")
OUT = setting("OUT", "run-paper")
LIMIT = setting("LIMIT", "0", 0)
REPEATS = setting("REPEATS", "2", 1)
FINITE_LIMIT = setting("FINITE_LIMIT", "100", 2)
SAMPLE_STEPS = setting("SAMPLE_STEPS", "250", 1)
COMMAND = shlex.split(setting("LAUNCH", "")) + [PROGRAM]


# ------------------------------------------------------------------------------------------------------------
# 1. Commands: run once, kept with what they printed, numbered where a table needs them
# ------------------------------------------------------------------------------------------------------------

child = None    # the command at work
numbers = {}    # {command line: its number in results.md}


def end_with_child(number, frame):
    """A signal ends the command at work, which saves what a training has learned, and then this program."""
    if child:
        child.send_signal(number)
        child.wait()
    print(f"paper.py: stopped by {signal.Signals(number).name}; the same command goes on", file=sys.stderr)
    sys.exit(128 + number)


def path(*parts):
    return os.path.join(OUT, *parts)


def write_whole(name, content):
    """Never half a file: written beside its place, then renamed."""
    with open(name + ".tmp", "wb") as file:
        file.write(content if isinstance(content, bytes) else content.encode())
    os.replace(name + ".tmp", name)


def end_with_parent():
    """Where this is Linux, SIGTERM comes when paper.py is killed: a training alone would go on unwatched."""
    prctl = getattr(ctypes.CDLL(None), "prctl", None)
    if prctl:
        prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


def call(arguments, meanwhile=lambda: None):
    """Runs the program. Returns what it printed to stdout and its largest memory in bytes. Progress goes to
    our stderr. It has a session of its own: Ctrl-C reaches it once, through us."""
    global child
    with open(path("output.tmp"), "w+") as output:
        child = subprocess.Popen(COMMAND + arguments, stdout=output, start_new_session=True,
                                 preexec_fn=end_with_parent)
        pid = 0
        while pid == 0:
            pid, status, usage = os.wait4(child.pid, os.WNOHANG)
            meanwhile()
            time.sleep(0 if pid else 0.02)
        code = child.returncode = os.waitstatus_to_exitcode(status)
        child = None
        if code:
            raise Failure(f"{shlex.join(COMMAND + arguments)}: ended with status {code}")
        output.seek(0)
        return output.read(), usage.ru_maxrss * 1024


def kept(name, arguments, checkpoints, products=()):
    """What the command printed. It is run only if this very command has not been, or if a checkpoint is
    newer; OUT/commands/NAME.txt has the command line and its output."""
    line = shlex.join(COMMAND + arguments)
    record = path("commands", name + ".txt")
    made = [record] + list(products)
    if (all(os.path.exists(file) for file in made)
            and all(os.path.getmtime(c) <= os.path.getmtime(record) for c in checkpoints)):
        with open(record) as file:
            command, output = file.read().split("\n", 1)
        if command == "$ " + line:
            return output
    print(f"== {line}", file=sys.stderr)
    output, _ = call(arguments)
    write_whole(record, f"$ {line}\n{output}")
    return output


def number(arguments):
    """[N], N being the number of this command in the list that ends results.md."""
    return f"[{numbers.setdefault(shlex.join(COMMAND + arguments), len(numbers) + 1)}]"


# ------------------------------------------------------------------------------------------------------------
# 2. Trainings
# ------------------------------------------------------------------------------------------------------------

def header_of(content):
    """The JSON header of a safetensors file's bytes."""
    length, = struct.unpack("<Q", content[:8])
    return json.loads(content[8:8 + length])


def read_bytes(name):
    with open(name, "rb") as file:
        return file.read()


def step_of(content):
    return int(header_of(content)["__metadata__"]["step"])


def weights_of(checkpoint):
    """How many weights, and the width of the score network."""
    header = header_of(read_bytes(checkpoint))
    channels = int(header.pop("__metadata__")["channels"])
    shapes = [entry["shape"] for name, entry in header.items() if name.startswith("params.")]
    return sum(math.prod(shape) for shape in shapes), channels


class Run:
    """One training: its name, which is that of its directory, its command and its checkpoint."""

    def __init__(self, variant, seed, steps, options):
        self.variant, self.seed, self.steps = variant, seed, steps
        self.name = f"{variant}-seed{seed}"
        self.directory = path(self.name)
        self.checkpoint = os.path.join(self.directory, "checkpoint.safetensors")
        self.arguments = (["train", "--data", DATA] + SMALL + options
                          + ["--seed", seed, "--steps", str(steps), "--sample-steps", "0", "--out",
                             self.directory])

    def step(self):
        """How far it is; -1: not begun."""
        return step_of(read_bytes(self.checkpoint)) if os.path.exists(self.checkpoint) else -1

    def kept_at(self, step):
        return path("kept", f"{self.name}-step{step}.safetensors")

    def keep(self, steps):
        """Copies the checkpoint if it stands at one of the steps and is not kept yet."""
        try:
            content = read_bytes(self.checkpoint)
        except FileNotFoundError:
            return
        step = step_of(content)
        if step in steps and not os.path.exists(self.kept_at(step)):
            write_whole(self.kept_at(step), content)

    def make(self, keep=()):
        """Trains what is still missing. Copies of the checkpoint are kept at the steps `keep`, multiples of
        the first: they must come from the whole training, whose learning rate falls towards its last step."""
        arguments = list(self.arguments)
        seen = 0

        def watch():
            nonlocal seen
            now = os.stat(self.checkpoint).st_mtime_ns if os.path.exists(self.checkpoint) else 0
            if now != seen:
                self.keep(keep)
            seen = now

        os.makedirs(self.directory, exist_ok=True)
        with open(os.path.join(self.directory, ".lock"), "a") as lock:
            fcntl.lockf(lock, fcntl.LOCK_EX)  # A training whose paper.py was killed may still be saving.
        begun = self.step()
        if begun == self.steps:
            return
        self.keep(keep)
        if keep:
            arguments += ["--save-every", str(keep[0])]
        if begun >= 0:
            arguments += ["--resume"]
        print(f"== {shlex.join(COMMAND + arguments)}", file=sys.stderr)
        _, memory = call(arguments, watch if keep else lambda: None)
        write_whole(os.path.join(self.directory, "memory.txt"), f"{memory}\n")

    def memory(self):
        """The largest memory in MB of the process that ended the training; one whose paper.py was killed is
        not known."""
        record = os.path.join(self.directory, "memory.txt")
        return f"{int(read_bytes(record)) / 1e6:.1f}" if os.path.exists(record) else "not measured"

    def seconds_a_step(self):
        """That of the fastest tenth of the log: other work on the machine makes no step faster."""
        with open(os.path.join(self.directory, "log.csv"), newline="") as file:
            clock = [float(row["seconds"]) for row in csv.DictReader(file)]
        size = max(1, (len(clock) - 1) // 10)
        spans = [clock[i:i + size + 1] for i in range(0, len(clock) - size, size)]
        # The clock begins anew where a training was resumed: such a span says nothing.
        seconds = [(span[-1] - span[0]) / size for span in spans
                   if span == sorted(span) and span[0] < span[-1]]
        return min(seconds) if seconds else clock[-1] / len(clock)


def widened():
    """The options of the VDM that is as large as DiffEnc: of the widths above, multiples of 4, that whose number
    of weights is nearest."""

    def count(model, *options):
        checkpoint = path("sizes", "-".join((model,) + options), "checkpoint.safetensors")
        arguments = ["train", "--data", DATA, *SMALL, "--model", model, *options, "--steps", "0", "--out",
                     os.path.dirname(checkpoint)]
        if not os.path.exists(checkpoint):
            call(arguments)
        return weights_of(checkpoint)

    (wanted, channels), distance = count("diffenc-4-2"), {}
    while not distance or distance[channels] == min(distance.values()):
        channels += 4
        distance[channels] = abs(count("vdm-4", "--channels", str(channels))[0] - wanted)
    return ["--model", "vdm-4", "--channels", str(min(distance, key=distance.get))]


def remembered(key, compute):
    """What must stay the same when an interrupted paper.py goes on: OUT/settings.json."""
    name = path("settings.json")
    settings = json.loads(read_bytes(name)) if os.path.exists(name) else {}
    if key not in settings:
        settings[key] = compute()
        write_whole(name, json.dumps(settings, indent=1) + "\n")
    return settings[key]


# ------------------------------------------------------------------------------------------------------------
# 3. Evaluations
# ------------------------------------------------------------------------------------------------------------

def bounds(name, checkpoints, chart=False):
    """`eval` of several checkpoints: the command, its output, the rows of its table, the chart's file."""
    table, picture = path("tables", name + ".csv"), path(name + ".svg")
    arguments = ["eval"] + checkpoints + ["--data", DATA, "--limit", str(LIMIT), "--repeats", str(REPEATS),
                                          "--csv", table]
    if chart:
        arguments += ["--chart", picture]
    output = kept(name, arguments, checkpoints, [table] + ([picture] if chart else []))
    with open(table, newline="") as file:
        return arguments, output, list(csv.DictReader(file))


def finite_bounds(name, checkpoint, T):
    """`eval --variance-ratio optimal`: its command, the bound with sigma_P = sigma_Q, the best one."""
    arguments = ["eval", checkpoint, "--data", DATA, "--limit", str(FINITE_LIMIT), "--timesteps", str(T),
                 "--variance-ratio", "optimal"]
    total = [line for line in kept(name, arguments, [checkpoint]).splitlines() if line.startswith("total:")]
    words = total[-1].split()  # total: 2.53 bpd with sigma_P = sigma_Q, 2.41 with the best sigma_P
    return arguments, float(words[1]), float(words[7])


def bound_at(name, checkpoint, T, ratio):
    """The bound at T steps with a given w: the command, the bound, its standard error."""
    arguments = ["eval", checkpoint, "--data", DATA, "--limit", str(LIMIT), "--repeats", str(REPEATS),
                 "--timesteps", str(T)] + (["--variance-ratio", ratio] if T else [])
    total = [line for line in kept(name, arguments, [checkpoint]).splitlines() if line.startswith("total ")]
    words = total[-1].split()  # total 2.53 +- 0.01
    return arguments, float(words[1]), float(words[3])


def picture(name, arguments, checkpoint):
    """A PNG of `sample` or `show` in results.md, and what the program says about it: a heat map's scale."""
    file = path(name + ".png")
    arguments = arguments + ["--out", file]
    told = kept(name, arguments, [checkpoint], [file]).strip()
    return f"\n![{name}]({name}.png) {number(arguments)}\n\n`{told}`\n"


# ------------------------------------------------------------------------------------------------------------
# 4. results.md
# ------------------------------------------------------------------------------------------------------------

def table(header, rows):
    lines = [header, ["---"] * len(header)] + rows
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines) + "\n"


def block(arguments, output):
    return f"```\n$ {shlex.join(COMMAND + arguments)}\n{output}```\n"


def plus_minus(value, error):
    return f"{float(value):.5f} +- {float(error):.5f}"


def signed(value, error):
    return f"{float(value):+.5f} +- {float(error):.5f}"


def welch_p(output, first, second):
    """p of the t-test of the totals of two groups of seeds, each named by its first checkpoint."""
    names = [f"Welch's t-test: {a} minus {b}" for a, b in ((first, second), (second, first))]
    tested = False
    for line in output.splitlines():
        if line.startswith("Welch's t-test: "):
            tested = line in names
        elif tested and line.startswith("total") and " p " in line:
            return line.split(" p ")[1]
    return "none"  # one seed only, or no spread


class Paper:
    """All trainings, and the sections of results.md, each a method that returns its text."""

    def __init__(self):
        self.wide = remembered("widened VDM", widened)
        self.options = {"vdm-4": ["--model", "vdm-4"],
                        "vdm-4-wide": self.wide,
                        "diffenc-4-nt": ["--model", "diffenc-4-nt"],
                        "diffenc-4-2": ["--model", "diffenc-4-2"],
                        "vdm-4-learned": ["--model", "vdm-4", "--schedule", "learned"],
                        "diffenc-4-2-learned": ["--model", "diffenc-4-2", "--schedule", "learned"]}
        self.variants = list(self.options) + ["vdm-4-longer"]
        unit = max(1, STEPS // 16)
        self.looked_at = [unit * share for share in SIXTEENTHS if unit * share < STEPS]
        self.runs = {}
        self.finite = {}

    def train(self):
        for seed in SEEDS:
            for variant, options in self.options.items():
                run = self.runs[variant, seed] = Run(variant, seed, STEPS, options)
                watched = seed == SEEDS[0] and variant in ("diffenc-4-nt", "diffenc-4-2")
                run.make(self.looked_at if watched else ())
            steps = remembered("steps of vdm-4-longer", self.steps_of_equal_time)
            run = self.runs["vdm-4-longer", seed] = Run("vdm-4-longer", seed, steps, self.options["vdm-4"])
            run.make()
        for ratio in RATIOS:
            options = ["--model", "diffenc-4-2", "--timesteps", str(TRAINED_T), "--variance-ratio", ratio]
            run = self.finite[ratio] = Run(f"diffenc-4-2-T{TRAINED_T}-w{ratio}", SEEDS[0],
                                           max(1, STEPS // 5), options)
            run.make()

    def steps_of_equal_time(self):
        vdm, diffenc = (self.runs[variant, SEEDS[0]].seconds_a_step() for variant in ("vdm-4", "diffenc-4-2"))
        return max(1, round(STEPS * diffenc / vdm))

    def checkpoints(self, variants, seeds):
        return [self.runs[variant, seed].checkpoint for variant in variants for seed in seeds]

    def everything(self):
        """All of equal steps and of equal time in one `eval`."""
        return bounds("bounds", self.checkpoints(self.variants, SEEDS))

    def of_seed(self, seed):
        """All of one seed: vdm-4 is the first, so these are the differences to it."""
        return bounds(f"bounds-seed{seed}", self.checkpoints(self.variants, [seed]), chart=seed == SEEDS[0])

    def pair(self, first, second):
        """A line of the table of differences: p, and for each seed the paired difference of the totals."""
        cells = [f"{second} minus {first}",
                 welch_p(self.everything()[1], *self.checkpoints([first, second], SEEDS[:1]))]
        for seed in SEEDS:
            both = self.checkpoints([first, second], [seed])
            arguments, _, rows = (self.of_seed(seed) if first == "vdm-4" else
                                  bounds(f"{second}-against-{first}-seed{seed}", both))
            row = [row for row in rows if row["checkpoint"] == both[1]][0]
            cells.append(signed(row["difference"], row["difference_error"]) + " " + number(arguments))
        return cells

    def bounds_by_term(self):
        arguments, output, rows = self.everything()
        lines = []
        for variant in self.variants:
            cells = [variant]
            for term in TERMS:
                values = [float(row[term]) for row in rows
                          if row["checkpoint"] in self.checkpoints([variant], SEEDS)]
                error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0
                cells.append(plus_minus(statistics.mean(values), error))
            lines.append(cells + [number(arguments)])
        pairs = [("vdm-4", variant) for variant in self.variants[1:]]
        pairs += [("vdm-4-wide", "diffenc-4-2"), ("vdm-4-longer", "diffenc-4-2"),
                  ("diffenc-4-nt", "diffenc-4-2"), ("vdm-4-learned", "diffenc-4-2-learned"),
                  ("diffenc-4-2", "diffenc-4-2-learned")]
        text = ("## The bound by term\n\nBits per dimension on the test images, mean over the seeds with its "
                "standard error.\n\n")
        text += table(["model"] + list(TERMS) + ["command"], lines)
        text += ("\nDifferences of the total: p of Welch's t-test over the seeds (of command "
                 f"{number(arguments)}), then for each seed the difference on the same images, times and "
                 "noise with the standard error of this paired difference.\n\n")
        text += table(["difference", "p"] + [f"seed {seed}" for seed in SEEDS],
                      [self.pair(first, second) for first, second in pairs])
        text += "\nThe same by term, as the program prints it:\n"
        for seed in SEEDS:
            text += "\n" + block(*self.of_seed(seed)[:2])
        return text

    def loss_over_time(self):
        text = ("## The loss over t\n\n![loss over t and lambda](bounds-seed" + SEEDS[0] + ".svg) "
                + number(self.of_seed(SEEDS[0])[0]) + "\n\nStep by "
                f"step at T = {FINITE_STEPS[1]}, on {FINITE_LIMIT} images with the same noise: what each "
                "step contributes, in bits per dimension. The encoder gains where the last columns are "
                "negative.\n\n")
        kl = {}
        for variant in ("vdm-4", "diffenc-4-nt", "diffenc-4-2"):
            name, checkpoint = self.finite_name(variant, FINITE_STEPS[1])
            arguments, _, _ = finite_bounds(name, checkpoint, FINITE_STEPS[1])
            lines = [line.split() for line in kept(name, arguments, [checkpoint]).splitlines()]
            steps = [line for line in lines if len(line) == 4 and line[0][0].isdigit()]
            kl[f"{variant} {number(arguments)}"] = {line[0]: float(line[3]) for line in steps}
        vdm, nt, diffenc = kl.values()
        text += table(["t"] + list(kl) + ["nt minus vdm", "diffenc minus vdm"],
                      [[t, f"{vdm[t]:.6f}", f"{nt[t]:.6f}", f"{diffenc[t]:.6f}", f"{nt[t] - vdm[t]:+.6f}",
                        f"{diffenc[t] - vdm[t]:+.6f}"] for t in vdm])
        return text

    def counterterm(self):
        text = ("## The counterterm's error over t\n\nThe generative model has sigma_t^2 x^ in the place of "
                "dx_t/dlambda. Below the loss over t and lambda: the relative error of that, after several "
                "steps of the same training. For nt it is that of x^ alone.\n")
        for variant in ("diffenc-4-nt", "diffenc-4-2"):
            run = self.runs[variant, SEEDS[0]]
            checkpoints = [run.kept_at(s) for s in self.looked_at if os.path.exists(run.kept_at(s))]
            name = f"counterterm-{variant}"
            arguments, output, _ = bounds(name, checkpoints + [run.checkpoint], chart=True)
            text += f"\n![{variant}]({name}.svg) {number(arguments)}\n\n" + block(arguments, output)
        return text

    def finite_name(self, variant, T):
        return f"finite-{variant}-T{T}", self.runs[variant, SEEDS[0]].checkpoint

    def finite_time(self):
        lines = []
        for variant in ("vdm-4", "diffenc-4-nt", "diffenc-4-2"):
            for T in FINITE_STEPS:
                arguments, plain, best = finite_bounds(*self.finite_name(variant, T), T)
                lines.append([variant, T, f"{plain:.5f}", f"{best:.5f}", f"{best - plain:+.5f}",
                              number(arguments)])
        text = (f"## Finite T\n\nBits per dimension on {FINITE_LIMIT} test images, all T steps of each: with "
                "sigma_P = sigma_Q, and with the best sigma_P at each t. The models were trained in "
                "continuous time.\n\n")
        text += table(["model", "T", "sigma_P = sigma_Q", "best sigma_P", "difference", "command"], lines)
        text += (f"\nTrained at T = {TRAINED_T} (diffenc-4-2, {self.finite[RATIOS[0]].steps} steps), with "
                 "w = sigma_Q^2/sigma_P^2:\n\n")
        lines = []
        for ratio, run in self.finite.items():
            cells = []
            for T, w in [(TRAINED_T, w) for w in RATIOS] + [(0, "1")]:
                arguments, total, error = bound_at(f"{run.name}-at-T{T}-w{w}", run.checkpoint, T, w)
                cells.append(plus_minus(total, error) + " " + number(arguments))
            arguments, plain, best = finite_bounds(f"{run.name}-best", run.checkpoint, TRAINED_T)
            cells += [f"{bound:.5f} {number(arguments)}" for bound in (plain, best)]
            lines.append([f"w = {ratio} {number(run.arguments)}"] + cells)
        text += table(["trained with"] + [f"bound at w = {w}" for w in RATIOS]
                      + ["continuous time", f"w = 1, {FINITE_LIMIT} images, all steps", "the same, best w"],
                      lines)
        return text

    def cost(self):
        arguments, _, rows = self.everything()
        total = {row["checkpoint"]: row for row in rows}
        seconds = {variant: min(self.runs[variant, seed].seconds_a_step() for seed in SEEDS)
                   for variant in self.variants}
        lines = []
        for variant in self.variants:
            run = self.runs[variant, SEEDS[0]]
            row = total[run.checkpoint]
            lines.append([variant, weights_of(run.checkpoint)[0], run.steps, f"{seconds[variant]:.4f}",
                          f"{seconds[variant] / seconds['vdm-4']:.2f}", f"{seconds[variant] * run.steps:.0f}",
                          run.memory(),
                          plus_minus(row["total"], row["total_error"]) + " " + number(arguments),
                          number(run.arguments)])
        return ("## The encoder's cost\n\nSeconds a step are those of the fastest tenth of the seeds' logs; "
                "memory is the largest of the whole training, its images and all. vdm-4-longer has as many "
                f"steps as fit into the time of diffenc-4-2. Bounds are those of seed {SEEDS[0]}.\n\n"
                + table(["model", "weights", "steps", "seconds a step", "of vdm-4's", "seconds in all", "MB",
                         "bound", "trained by"], lines))

    def schedules(self):
        lines = []
        arguments, _, rows = self.everything()
        for variant in ("vdm-4", "vdm-4-learned", "diffenc-4-2", "diffenc-4-2-learned"):
            for seed in SEEDS:
                row = [row for row in rows if row["checkpoint"] == self.runs[variant, seed].checkpoint][0]
                lines.append([variant, seed] + [plus_minus(row[term], row[term + "_error"])
                                                for term in TERMS]
                             + [number(arguments)])
        return ("## Fixed against learned schedule\n\n"
                + table(["model", "seed", "recon", "latent", "diffusion", "total", "command"], lines))

    def pictures(self):
        text = "## Pictures\n\n64 samples of each, then what the encoders do over t.\n"
        for variant in self.variants:
            checkpoint = self.runs[variant, SEEDS[0]].checkpoint
            arguments = ["sample", checkpoint, "--steps", str(SAMPLE_STEPS)]
            text += picture("samples-" + variant, arguments, checkpoint)
        for variant in ("diffenc-4-nt", "diffenc-4-2", "diffenc-4-2-learned"):
            checkpoint = self.runs[variant, SEEDS[0]].checkpoint
            arguments = ["show", checkpoint, "--data", DATA, "--times", SHOWN_TIMES]
            text += picture("encoder-" + variant, arguments, checkpoint)
        return text

    def write(self):
        """Numbers go to the commands in the order of the trainings, then as the tables use them."""
        for run in list(self.runs.values()) + list(self.finite.values()):
            number(run.arguments)
        sections = [section() for section in (self.bounds_by_term, self.loss_over_time, self.counterterm,
                                              self.finite_time, self.cost, self.schedules, self.pictures)]
        head = (f"# What came of it\n\n{len(SEEDS)} seeds ({', '.join(SEEDS)}), {STEPS} steps, data {DATA}, "
                f"{LIMIT or 'all'} test images, {REPEATS} draws of time and noise for each. A number in "
                "brackets is that of the command behind a figure, in the list at the end; what each printed "
                "is in commands/.\n")
        commands = "## Commands\n\n" + "".join(f"{n}. `{line}`\n" for line, n in numbers.items())
        write_whole(path("results.md"), "\n".join([head] + sections + [commands]))


def main():
    for signal_number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(signal_number, end_with_child)
    for directory in ("commands", "tables", "kept", "sizes"):
        os.makedirs(path(directory), exist_ok=True)
    settings = f"STEPS={STEPS} MNIST_DIR={DATA}"
    if remembered("made with", lambda: settings) != settings:
        raise Failure(f"{OUT}: was made with {remembered('made with', None)}, not {settings}; "
                      "OUT=DIRECTORY names another")
    if DATA != "digits" and not os.path.isdir(DATA):
        raise Failure(f"{DATA}: is not there; `make mnist` fetches MNIST, MNIST_DIR=DIR says where it is")
    paper = Paper()
    paper.train()
    paper.write()
    print(path("results.md"))


if __name__ == "__main__":
    try:
        main()
    except (Failure, OSError) as failure:
        print(f"paper.py: {failure}", file=sys.stderr)
        sys.exit(1)
