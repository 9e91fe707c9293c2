"""What enhancement costs, on one thread, with the network of the experiment and random weights.

    python -m benchmarks.sgmse.speed     # four minutes

Times are of settings timed in turn in one run. The authors' order of work is the whole file in one pass, one channel
at a time, by 60 calls. Peak memory is that of a process of its own.
"""

import multiprocessing
import os
import resource
import time

import numpy as np
import torch

from benchmarks.harness import figure, interleaved, write_result
from benchmarks.sgmse.experiment import UNET
from diffusers_ext import OUVEScheduler, SGMSEUNet2DModel, SpeechEnhancementPipeline

RATE, SECONDS = 8000, 10
SAYS = {
    "pc_30_over_transitions_5": "60 calls of predictor and corrector take {} times as long as 5 transitions.",
    "original_order_over_transitions_5": "Stereo in the authors' order of work, by 60 calls, takes {} times as long.",
    "pipeline_over_calls": "A call of the pipeline takes {} times as long as its calls of the network alone.",
    "memory_10_min_over_10_s": "Ten minutes of sound need {} times the memory of ten seconds.",
    "two_processes_over_one": "Two processes enhance {} times as many files in the same time as one.",
}


def pipeline(algorithm):
    torch.manual_seed(0)
    scheduler = OUVEScheduler(prediction_type="sample", algorithm=algorithm)
    made = SpeechEnhancementPipeline(SGMSEUNet2DModel(**UNET).eval(), scheduler, RATE, 254, 64)
    made.set_progress_bar_config(disable=True)
    return made


def wave(seconds, channels=1):
    return np.random.default_rng(0).standard_normal((channels, round(seconds * RATE))).astype(np.float32)


def peak(seconds):
    """Returns the largest size of this process, in MiB, after enhancing so much sound."""
    torch.set_num_threads(1)
    pipeline("transitions")(wave(seconds)[0], RATE, num_inference_steps=1, batch_size=1)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def work(count):
    torch.set_num_threads(1)
    made = pipeline("transitions")
    for _ in range(count):
        made(wave(4)[0], RATE, num_inference_steps=5)


def processes(number, files=8):
    """Returns the seconds in which so many processes enhance the files."""
    context = multiprocessing.get_context("fork")
    start = time.perf_counter()
    workers = [context.Process(target=work, args=(files // number,)) for _ in range(number)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return time.perf_counter() - start


def main():
    torch.set_num_threads(1)
    start, figures = time.perf_counter(), {}
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        sizes = {seconds: pool.apply(peak, (seconds,)) for seconds in (10, 600)}
    figures["memory_10_min_over_10_s"] = figure(sizes[600] / sizes[10], "ratio", "<= 1.2")
    pc, transitions, mono, stereo = pipeline("pc"), pipeline("transitions"), wave(SECONDS), wave(SECONDS, 2)

    def calls():
        """The calls of the network that 5 transitions of the mono wave make."""
        frames = -(-(round(SECONDS * RATE) // 64 + 1) // 4) * 4
        x = torch.zeros(1, 4, 128, frames)
        with torch.no_grad():
            for t in transitions.scheduler.timesteps:
                transitions.unet(x, t)

    transitions.scheduler.set_timesteps(5)
    ours = {"transitions": lambda: transitions(mono[0], RATE, num_inference_steps=5)}
    times = interleaved(ours | {"calls": calls}, 5)
    figures["pipeline_over_calls"] = figure(times["transitions"] / times["calls"], "ratio", "<= 1.05")
    times = interleaved(
        ours
        | {
            "pc": lambda: pc(mono[0], RATE, num_inference_steps=30),
            "stereo": lambda: transitions(stereo, RATE, num_inference_steps=5),
            "original": lambda: [pc(one, RATE, num_inference_steps=30, chunk_seconds=1e4) for one in stereo],
        },
        1,  # twelve times as long, so noise of the machine is small beside it
    )
    figures["pc_30_over_transitions_5"] = figure(times["pc"] / times["transitions"], "ratio", ">= 8")
    figures["original_order_over_transitions_5"] = figure(times["original"] / times["stereo"], "ratio", ">= 4")
    figures["real_time_factor_original_order"] = figure(times["original"] / 2 / SECONDS, "seconds a second")
    figures["real_time_factor"] = figure(times["transitions"] / SECONDS, "seconds a second")
    one, two = processes(1), processes(2)
    figures["two_processes_over_one"] = figure(one / two, "ratio", ">= 1.6")
    figures["cores"] = figure(os.cpu_count() or 1, "cores")
    seconds = time.perf_counter() - start
    write_result("sgmse/speed", "python -m benchmarks.sgmse.speed", figures, [0], seconds, says=SAYS)


if __name__ == "__main__":
    main()
