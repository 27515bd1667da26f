"""Training one expert: one flat function, read top to bottom.

    open run -> load UNet -> [ draw t -> batch -> loss -> backward ] x accumulation -> step -> average -> log -> save

Two of these run at once on one store and share nothing else. Which expert this is stands in the config's timesteps.
"""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, closing, nullcontext
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor

from shared.conditioning import PromptEmbeds
from shared.errors import DataError, Stopped
from shared.progress import progress, say
from shared.stopping import stop_requests
from shared.store import StoreReader
from trainer.advice import objective_advice
from trainer.checkpoint import TrainingState, save_checkpoint
from trainer.compiled import compile_blocks, recompiling_is_an_error, warm_up
from trainer.config import ExpertConfig
from trainer.data import BatchReader, prefetch, read_null_text
from trainer.ema import Ema
from trainer.exposure import exposure_to
from trainer.held_out import HeldOut
from trainer.learning_rate import rate_share
from trainer.loss import DenoisingLoss
from trainer.loss_bins import LossBins
from trainer.meter import Meter
from trainer.model_card import model_card
from trainer.optim import Optimizer
from trainer.partitions import own_micro_batches, own_places, partitions_read, partitions_text
from trainer.partner import stand_by
from trainer.processes import joined
from trainer.run import Request, Run, make_order, open_run_together
from trainer.saving import SaveTurns, surviving_a_full_disk
from trainer.start import start_advice
from trainer.trackers import Curves
from trainer.trained import export_of, kept_weights, load_trained, restore_average, seed_layers
from trainer.unet import ConditionedUnet
from trainer.view import describe_view, view_of


def train_expert(request: Request) -> int:
    """Train the expert that `request` describes, or go on with it, to its last step; returns the step reached.

    Raises Stopped (exit 75) after saving where the process was asked to stop, and whatever open_run raises.
    """
    config = request.config
    with (
        stop_requests() as stop,
        joined(request.device) as processes,
        StoreReader(request.store) as store,
        closing(open_run_together(request, processes)) as run,
    ):
        own = own_places(processes.index, processes.count, config.accumulation, config.partitions)
        device, share, partitions = processes.device, len(own), partitions_read(own, config.partitions)
        if run.first_step >= config.steps:
            say(f"{run.folder} is complete: {run.first_step} steps")
            return run.first_step

        # What is trained, and what it is trained by.
        is_lean = config.precision == "bf16-lean"
        unet = load_trained(config, run.start, run.checkpoint, device)
        if config.channels_last:
            unet.to(memory_format=torch.channels_last)
        if config.compile:
            compile_blocks(unet)
        parameters = [weight for weight in unet.parameters() if weight.requires_grad]
        optimizer = Optimizer(parameters, config.optimizer, is_lean=is_lean)
        ema_device = torch.device("cpu") if config.ema.device == "cpu" else device
        ema = Ema(unet, config.ema.decay, device=ema_device) if config.ema.decay else None
        skipped = _restore(run, optimizer, ema, device)

        # What it is trained on, and towards what.
        settings, facts = run.manifest.settings, run.card.facts
        export = export_of(unet, run.start, facts)
        trained = processes.wrap(unet)
        predict, predict_alone = (
            partial(predict_in_precision, ConditionedUnet(model, facts.layout, settings.text_widths[1]), config, device)
            for model in (trained, unet)
        )
        schedule = run.card.contract.schedule(device)
        partner = stand_by(run.partner, request, settings.text_widths[1], device)
        loss = DenoisingLoss(
            schedule,
            config.range,
            config.schedule.prediction_type,
            settings.scaling_factor,
            config.loss,
            config.seed,
            read_null_text(store, run.manifest, facts.null_prompt, device),
            exposure_to(partner.predict, config, schedule) if partner else None,
        )
        pools = view_of(run.manifest, config.data, partitions, config.partitions)
        reader = BatchReader(
            store,
            run.manifest,
            pools,
            captions=config.data.captions,
            seed=config.seed,
            pin_memory=device.type == "cuda",
            on_corrupt=lambda path, why: run.log.write("corrupt", path=path, why=why),
        )
        order = make_order(run, pools, partitions)
        steps_before = run.first_step - run.manifest_use.from_step
        mine = own_micro_batches(own, config.accumulation)
        batches = prefetch(lambda index: reader.read(order[mine(index)]), steps_before * share)
        trackers = config.log.trackers if processes.is_first else ()
        curves = Curves(run.folder, run.first_step, trackers, config.log.project, config.model_dump(mode="json"))
        seen = describe_view(run.manifest, pools)
        if config.partitions > 1:
            seen += f", {partitions_text(partitions, config.partitions)}"
        say(f"{config.name}: timesteps {config.range}, {seen}, {device}, {config.precision}")
        if partner is not None:
            run.log.write("partner", step=run.first_step, **partner.fields())
        for line in [*objective_advice(config), *start_advice(config, request.model, request.start)]:
            run.log.write("advice", why=line)
            say(f"note: {line}")

        held_out = HeldOut(run, store, loss, device) if processes.is_first else None
        draw_timesteps = at_a_stretch(lambda step: loss.timesteps(step, config.batch * config.accumulation, device))
        bins = LossBins(loss.within, device)
        meter, save_turns = Meter(config.batch * config.accumulation), SaveTurns(config.checkpoint)
        advance_bar = progress(config.name, config.steps, "steps", run.first_step)
        with closing(batches), closing(curves), recompiling_is_an_error(config.compile), advance_bar as advance:
            if config.compile:
                warm_up(unet, predict_alone, {pool.hw for pool in pools}, config.batch, settings, device)
            if processes.any(stop.asked()):
                raise Stopped(f"{run.folder} was opened and nothing done; the same command goes on")
            for step in range(run.first_step, config.steps):
                optimizer.scale_rates(rate_share(step, config.steps, config.optimizer.rate))
                t = draw_timesteps(step).view(-1, config.batch)
                step_loss, epoch = torch.zeros((), device=device), 0.0
                for micro, t_micro in enumerate(t[place] for place in own):
                    batch = meter.wait(batches).to(device)
                    seed_layers(config.seed, batch.places[0], device)
                    with processes.averaging(trained, now=micro == share - 1):
                        losses = loss(predict, batch, t_micro)
                        micro_loss = losses.mean() / share
                        torch.autograd.backward(micro_loss)
                    bins.add(t_micro, losses)
                    step_loss += micro_loss.detach()
                    epoch = max(epoch, batch.places[-1][0])

                # A step whose gradients are not finite is skipped and counted on the device; nobody waits for it here.
                norm = optimizer.clip(config.optimizer.clip_norm)
                is_bad = (~(norm < math.inf)).float()  # nor is NaN below it
                optimizer.step_unless_bad(is_bad)
                optimizer.zero_grad()
                if ema is not None:
                    ema.update(optimizer.weights())
                skipped += is_bad
                meter.add(step_loss, norm)
                advance(1)

                done = step + 1
                is_last = done == config.steps
                # Read once: a request that comes while saving is answered after the next step.
                asked, epoch = processes.most(stop.asked(), epoch)
                is_asked = bool(asked)
                if done % config.log.every == 0 or is_last:
                    values = meter.read(processes.mean) | {
                        "learning_rate": optimizer.learning_rate,
                        "skipped": int(skipped),
                    }
                    by_t = bins.read(processes.total(bins.take()))
                    run.log.write("step", step=done, epoch=int(epoch), **values, bins=[one.as_list() for one in by_t])
                    curves.log(values | {f"loss/{one.name}": one.loss for one in by_t}, done)
                    if partner is not None and not is_last and (took_s := partner.renew(processes)):
                        run.log.write("partner", step=done, **partner.fields())
                        meter.leave_out(took_s)
                    if int(skipped) > config.optimizer.max_skipped:
                        raise DataError(f"{int(skipped)} steps had gradients that were not finite: giving up at {done}")
                is_saving = processes.is_first and (save_turns.is_turn(done) or is_last or is_asked)
                score = None
                if held_out is not None and not is_asked and held_out.is_turn(done, is_saving):
                    with optimizer.averaged():
                        score = held_out.measure(predict_alone, unet, ema, stop.asked)
                if score is not None:
                    run.log.write("eval", step=done, **score.fields())
                    curves.log(score.curves(), done)
                    meter.leave_out(score.took_s)
                if is_saving:
                    state = TrainingState(
                        step=done,
                        epoch=int(epoch),
                        ema_updates=ema.updates if ema else 0,
                        skipped=int(skipped),
                        threads=torch.get_num_threads(),
                        torch=torch.__version__,
                        partner_step=partner.step if partner else None,
                        partner_sha256=partner.sha256 if partner else None,
                    )
                    moments = optimizer.tensors()
                    room = surviving_a_full_disk(run.folder, run.log, done, is_last_chance=is_last or is_asked)
                    with room, optimizer.averaged():
                        path = save_checkpoint(
                            run.folder,
                            state,
                            run.card,
                            model_card(run.card, config, settings.datasets, done),
                            export,
                            kept_weights(unet, facts, ema),
                            moments,
                            config.checkpoint.keep,
                            config.checkpoint.keep_best,
                            score.best if score else None,
                        )
                        run.log.write("checkpoint", step=done, path=path.name)
                if is_asked and not is_last:
                    run.log.write("stopped", step=done)
                    raise Stopped(f"{run.folder} is saved at step {done} of {config.steps}; the same command goes on")
        run.log.write("complete", step=config.steps)
        return config.steps


def at_a_stretch(draw: Callable[[int], Tensor], steps: int = 16) -> Callable[[int], Tensor]:
    """What `draw` gives for a step, asked for `steps` of them at once: its code leaves the caches between two steps."""
    draw_some = lru_cache(maxsize=1)(lambda first: [draw(step) for step in range(first, first + steps)])
    return lambda step: draw_some(step - step % steps)[step % steps]


def predict_in_precision(
    model: ConditionedUnet,
    config: ExpertConfig,
    device: torch.device,
    x_t: Tensor,
    t: Tensor,
    text: PromptEmbeds,
    time_ids: Tensor,
) -> Tensor:
    """What the UNet answers, computed in the precision that the config asks for."""
    is_mixed = config.precision == "bf16-mixed"
    autocast: AbstractContextManager[Any] = torch.autocast(device.type, torch.bfloat16) if is_mixed else nullcontext()
    with autocast:
        return model(x_t.to(model.dtype), t, text, time_ids, config.loss.aesthetic_score)


def _restore(run: Run, optimizer: Optimizer, ema: Ema | None, device: torch.device) -> Tensor:
    """Optimizer and average as they were saved; returns the count of skipped steps, on the device."""
    if run.checkpoint is None:
        return torch.zeros((), device=device)
    state = run.checkpoint.state
    optimizer.load(run.checkpoint.optimizer_tensors())
    if ema is not None:
        restore_average(ema, run.checkpoint)
    if state.threads != torch.get_num_threads() or state.torch != torch.__version__:
        say("going on with another number of threads or version of torch: not bit for bit what it would have been")
    say(f"{run.folder} goes on after step {state.step}")
    return torch.tensor(float(state.skipped), device=device)
