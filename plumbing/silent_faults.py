"""Says once, in a line, what goes wrong in a run without being an error."""

import torch

COLLAPSED = 0.99    # share of a layer's tokens that one expert has
COLLAPSED_FOR = 100     # steps
SETTLED = 300       # steps after which a teacher's loss should have moved, or the end of a stage
SHORTEST = 100      # a stage of fewer steps is too short to tell
STILL = 0.02        # change, relative to the start


class SilentFaults:
    """Looks at every step of a run; `warn` gets a line, of each kind and place one."""

    def __init__(self, warn):
        self.warn = warn
        self.collapsed_for = {}     # layer: for how many steps in a row
        self.losses = {}            # (stage, teacher): its loss in each step

    def look(self, stage: int, step: int, values: dict, last: bool) -> None:
        """A step's values; `last` is that of a stage."""
        if "experts" in values:
            for layer, shares in enumerate(values["experts"].tolist()):
                self.look_at_router(stage, step, layer, shares)
        for name, value in values.items():
            # CLIP's own loss starts near 0, where the student starts: it may stay there
            if name.startswith("kd_") and name != "kd_clip":
                self.look_at_teacher(stage, step, name.removeprefix("kd_"), value.item(), last)

    def look_at_router(self, stage: int, step: int, layer: int, shares: list[float]) -> None:
        """Warn if one expert has had all tokens of a layer for long."""
        so_far = self.collapsed_for.get(layer, 0)
        self.collapsed_for[layer] = so_far + 1 if max(shares) > COLLAPSED else 0
        if len(shares) > 1 and self.collapsed_for[layer] == COLLAPSED_FOR:
            expert = shares.index(max(shares))
            self.warn(f"warning: layer {layer}: expert {expert} has {100 * max(shares):.1f} % of "
                      f"the tokens, for {COLLAPSED_FOR} steps now (stage {stage}, step {step}); a "
                      "higher --balance-weight keeps the others in use")

    def look_at_teacher(self, stage: int, step: int, teacher: str, loss: float, last: bool) -> None:
        """Warn if a teacher's loss is where it was when the stage began."""
        losses = self.losses.setdefault((stage, teacher), [])
        if len(losses) == SETTLED:
            return  # it has been looked at
        losses.append(loss)
        if len(losses) != SETTLED and not (last and SHORTEST <= len(losses) < SETTLED):
            return
        start = torch.tensor(losses[:20]).mean().item()
        now = torch.tensor(losses[-20:]).mean().item()
        if abs(now - start) <= STILL * start:
            self.warn(f"warning: teacher {teacher}: L_kd's part of it has hardly moved in "
                      f"{len(losses)} steps of stage {stage}: {start:.3g}, now {now:.3g}; nothing "
                      "is learnt from it")
