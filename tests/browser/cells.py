"""The cells of the notebook that the browser's tests look at."""

from __future__ import annotations

STEPS = 20_000
"""Of a run that somebody stops: they take longer than a test may."""

SETUP = """
import math, os, time
from nbaccel import last_run, launch, notebook_launcher, runs
from nbaccel.wire import events

def train(steps, fail=False, holds=()):
    rank = int(os.environ["RANK"])
    for step in range(1, steps + 1):
        time.sleep(0.03)
        if step % 20 == 0:
            print(f"step {step} of rank {rank}", flush=True)
        times = {"data": 0.01, "forward": 0.015, "backward": 0.02, "optimizer": 0.004}
        events.emit(events.Progress(name="train", step=step, total=steps, epoch=0, unit="batch", times=times))
        events.emit(events.Metric(values={"loss": math.exp(-step / 40) + 0.02 * rank}, step=step))
        while step in holds and not os.path.exists(f"past-{step}"):
            time.sleep(0.05)
        if fail and rank == 1 and step == steps // 2:
            raise ValueError("<b>no such</b> \\x1b[31mshape")
    return rank

notebook_launcher(int, num_processes=2)
"""
RUN, STOP, FAIL, SHOW, ASK, LATER, AGAIN, LISTED, KNOB, WIDGET, SESSION, DEAF, BLOCKS, MAP, COMPARE = range(
    1, 16
)
CELLS = {
    RUN: "notebook_launcher(train, (90, False, (30, 60)), num_processes=4)",
    STOP: f"""
try:
    notebook_launcher(train, ({STEPS},), num_processes=2)
except KeyboardInterrupt:
    print("stopped")
""",
    FAIL: "notebook_launcher(train, (40, True), num_processes=2)",
    SHOW: """
def show():
    from IPython.display import HTML, Markdown, clear_output
    import matplotlib.pyplot as plt, pandas, PIL.Image, plotly.graph_objects as go
    from huggingface_hub.utils import tqdm as hub_tqdm
    from tqdm.auto import tqdm
    rank = int(os.environ["RANK"])
    kinds = [(tqdm, "of the rank"), (hub_tqdm, "of the hub")]
    if rank == 1:  # slow to import
        from transformers.utils.logging import tqdm as transformers_tqdm
        kinds.append((transformers_tqdm, "of transformers"))
    for kind, name in kinds:
        for _ in kind(range(5), desc="bar " + name):
            time.sleep(0.05)
    plt.figure(figsize=(2, 1)); plt.plot([1, 3, rank]); plt.show()
    handle = display(HTML("<b>first</b>"), display_id=True)
    handle.update(HTML(f"<b>second of {rank}</b>"))
    display(PIL.Image.new("RGB", (30, 20), (200, 40 * rank, 0)))
    display(pandas.DataFrame({"column of pandas": [rank]}))
    go.Figure(go.Scatter(y=[1, 3, rank])).show()
    if rank == 1:
        display(Markdown("*only* one"))
notebook_launcher(show, num_processes=2)
""",
    ASK: """
def asked():
    import getpass
    rank = int(os.environ["RANK"])
    word = input("name? ") if rank else getpass.getpass("secret? ")
    if rank:
        inner = 41
        breakpoint()
    return word
notebook_launcher(asked, num_processes=2)
""",
    LATER: f"run = launch(train, {STEPS}, num_processes=2)",
    AGAIN: "last_run().show()",
    LISTED: "run.kill(); run.exception(); print(runs()[0].name); print(run.report())",
    KNOB: """
def tuned():
    import torch
    from nbaccel import Accelerator
    accelerator = Accelerator()
    model = torch.nn.Linear(2, 1)
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.01))
    for step in range(20_000):
        width = accelerator.knob("width", 3, low=1, high=9)
        if width != 3:
            return f"{width} at step {step}"
        accelerator.backward(model(torch.ones(4, 2)).sum())
        optimizer.step()
        time.sleep(0.02)
notebook_launcher(tuned, num_processes=2)
""",
    WIDGET: """
def widgets_of():
    import ipywidgets as widgets
    rank = int(os.environ["RANK"])
    if rank == 0:
        time.sleep(1)
        return
    slider = widgets.IntSlider(value=3, max=9, description="level")
    label, button, pressed = widgets.Label("untouched"), widgets.Button(description="go on"), []
    def moved(change):
        label.value = f"moved to {change['new']} in {os.environ['RANK']}"
    slider.observe(moved, "value")
    button.on_click(lambda _: pressed.append(1))
    display(widgets.VBox([slider, label, button]))
    end = time.time() + 300
    while not pressed and time.time() < end:
        time.sleep(0.05)
    return f"level {slider.value}"
notebook_launcher(widgets_of, num_processes=2)
""",
    SESSION: """
from nbaccel import Session
def prepare():
    import __main__, torch
    from nbaccel import Accelerator
    __main__.accelerator = Accelerator()
    model = torch.nn.Linear(2, 1)
    data = torch.utils.data.TensorDataset(torch.ones(40_000, 2))
    __main__.prepared = __main__.accelerator.prepare(
        model, torch.optim.SGD(model.parameters(), lr=0.01), torch.utils.data.DataLoader(data)
    )
def stopped():
    import __main__
    model, optimizer, loader = __main__.prepared
    steps = 0
    for (batch,) in loader:
        __main__.accelerator.backward(model(batch).sum())
        optimizer.step()
        steps += 1
        time.sleep(0.01)
    return steps
with Session(num_processes=2) as session:
    session.run(prepare)
    for _ in range(2):
        steps = notebook_launcher(stopped, session=session)
        print("both at the same step:", 0 < steps[0] == steps[1] < 20_000)
""",
    DEAF: """
def deaf():
    end = time.time() + 300
    while time.time() < end:
        try:
            time.sleep(1)
        except KeyboardInterrupt:
            print("not now", flush=True)
try:
    notebook_launcher(deaf, num_processes=2)
except KeyboardInterrupt:
    print("gone")
""",
    BLOCKS: f"notebook_launcher(train, ({STEPS},), num_processes=2)",
    MAP: """
import nbaccel
def trial(lr, width):
    import torch
    acc = nbaccel.Accelerator(cpu=True)
    if lr == 0.3:
        raise ValueError("diverged")
    model = torch.nn.Linear(1, width)
    model, optimizer = acc.prepare(model, torch.optim.SGD(model.parameters(), lr=lr / 10))
    for step in range(20_000):
        loss = (model(torch.ones(1, 1)) - 1).square().mean()
        acc.step(loss, optimizer)
        acc.log({"loss": loss}, step=step)
        time.sleep(0.02)
        if acc.should_stop or (lr == 0.1 and step == 20):
            break
    return {"steps": step + 1}
results = nbaccel.map(trial, {"lr": [0.3, 0.1, 0.2], "width": [1, 2]}, parallel=2, device="cpu")
print([value and value["steps"] < 20_000 for value in results], [trial.state for trial in results.trials])
""",
    COMPARE: "nbaccel.compare(results.trials[2].run, results.trials[4].run)",
}
