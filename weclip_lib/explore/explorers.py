"""Explorers for a notebook or a page: from picture to CAM, and from patch to patch.

`stages.py` and `affinities.py` compute; this module holds the controls. They work with a mouse, and
with the keyboard alone (Tab, arrow keys, Enter).
"""

from collections.abc import Sequence

import ipywidgets as widgets

from weclip_lib.config import Method
from weclip_lib.explore.affinities import Affinities
from weclip_lib.explore.stages import Picture, Pipeline, Settings, Stages
from weclip_lib.explore.widgets import NAMED, ROW, WIDE, GridPicture, PictureExplorer
from weclip_lib.figures import panels
from weclip_lib.figures.plotting import colours

MEAN = -1  # instead of a head's number
LISTED = 7  # prompts whose probability is shown


def _slider(name: str, low: int, high: int, value: int) -> widgets.IntSlider:
    return widgets.IntSlider(
        value=value, min=low, max=high, description=name, style=NAMED, layout=WIDE
    )


class CamExplorer(PictureExplorer):
    """Shows all stages from a picture and words to a pseudo label, with a control per setting.

    Args:
        pipeline: Frozen backbone and classes.
        method: Settings to start from.
        pictures: To choose from.
    """

    def __init__(self, pipeline: Pipeline, method: Method, pictures: Sequence[Picture]) -> None:
        super().__init__(
            {
                "picture": "picture",
                "cam": "initial CAM",
                "boxes": "boxes",
                "refined": "spread along attention",
                "par": "after PAR",
                "label": "pseudo label",
                "truth": "truth",
            },
            pipeline,
            pictures,
        )
        self.method = method
        labels, blocks = pipeline.labels, len(pipeline.backbone.blocks)
        self.words = widgets.Text(
            description="look for", placeholder="boat; cat", style=NAMED, layout=WIDE,
            continuous_update=False,
        )  # fmt: skip
        self.present = widgets.HBox(layout=ROW)
        self.shown = widgets.Dropdown(description="map of", style=NAMED, layout=WIDE)
        self.with_backgrounds = widgets.Checkbox(
            value=True, description="background prompts compete", indent=False
        )
        self.backgrounds = widgets.SelectMultiple(
            options=labels.backgrounds, value=labels.backgrounds, rows=8,
            description="background prompts", style=NAMED, layout=WIDE,
        )  # fmt: skip
        self.template = widgets.Text(
            description="template", style=NAMED, layout=WIDE, continuous_update=False
        )
        self.block = _slider("Grad-CAM at block", 0, blocks - 1, blocks - 1)
        self.threshold = widgets.FloatSlider(
            min=0, max=1, step=0.05, description="box threshold", style=NAMED, layout=WIDE
        )
        self.maps = _slider("attention maps", 1, blocks, method.static_layers)
        self.rounds = _slider("Sinkhorn rounds", 0, 8, method.sinkhorn_rounds)
        self.steps = _slider("steps of spreading", 0, 6, 2)
        self.par_iterations = _slider("PAR iterations", 0, 40, method.par_iterations)
        self.reset = widgets.Button(description="back to the published settings", layout=WIDE)
        self.scores = widgets.HTML()
        self.stages: Stages | None = None
        self._arrange()
        self._connect()
        self._choose()

    def _arrange(self) -> None:
        left = [self.words, self.present, self.shown, self.with_backgrounds, self.template]
        right = [self.block, self.threshold, self.maps, self.rounds, self.steps]
        more = widgets.Accordion([self.backgrounds], titles=["which background prompts"])
        controls = widgets.HBox(
            [
                widgets.VBox([*left, more]),
                widgets.VBox([*right, self.par_iterations, self.reset]),
            ],
            layout=ROW,
        )
        shown = widgets.HBox(list(self.panels.values()), layout=ROW)
        heading = widgets.HTML("<b>probability of each prompt</b>")
        self.children = [self.gallery, controls, self.message, shown, heading, self.scores]

    def _connect(self) -> None:
        self.words.observe(self._retype, "value")
        self.reset.on_click(lambda _: self._reset())
        self._follow(
            self.shown, self.with_backgrounds, self.backgrounds, self.template, self.block,
            self.threshold, self.maps, self.rounds, self.steps, self.par_iterations,
        )  # fmt: skip

    def settings(self) -> Settings:
        """Read the controls."""
        chosen = self.backgrounds.value if self.with_backgrounds.value else ()
        return Settings(
            words=tuple(button.description for button in self.present.children if button.value),
            backgrounds=tuple(chosen),
            template=self.template.value,
            block=self.block.value,
            box_threshold=self.threshold.value,
            maps=self.maps.value,
            rounds=self.rounds.value,
            steps=self.steps.value,
            par_iterations=self.par_iterations.value,
        )

    def _reset(self) -> None:
        """Move all controls to the published settings."""
        words = self.gallery.chosen.tags or tuple(self._typed())
        labels, blocks = self.pipeline.labels, len(self.pipeline.backbone.blocks)
        chosen = Settings.published(labels, self.method, blocks, words)
        with self._holding():
            self._list_words(words)
            self.backgrounds.value, self.with_backgrounds.value = chosen.backgrounds, True
            self.template.value, self.block.value = chosen.template, chosen.block
            self.threshold.value, self.maps.value = chosen.box_threshold, chosen.maps
            self.rounds.value, self.steps.value = chosen.rounds, chosen.steps
            self.par_iterations.value = chosen.par_iterations
        self._refresh()

    def _typed(self) -> list[str]:
        return [word.strip() for word in self.words.value.split(";")]

    def _list_words(self, words: Sequence[str]) -> None:
        """Make a button for every word, which removes it from the classes; list the words."""
        old = self.present.children
        buttons = []
        for word in dict.fromkeys(words):
            button = widgets.ToggleButton(value=True, description=word, tooltip="present or not")
            button.observe(self._toggle, "value")
            buttons.append(button)
        self.present.children = buttons
        for button in old:
            button.close()
        with self._holding():
            self.words.value = "; ".join(words)
            self._offer()

    def _offer(self) -> None:
        """Offer the words that count as present; the chosen one stays if among them."""
        words = [button.description for button in self.present.children if button.value]
        kept = self.shown.value if self.shown.value in words else None
        with self._holding():
            self.shown.options = words
            self.shown.value = kept or (words[0] if words else None)

    def _toggle(self, _change: object) -> None:
        self._offer()
        self._refresh()

    def _retype(self, _change: object) -> None:
        if not self._held:
            self._list_words(self._typed())
            self._refresh()

    def _choose(self, _change: object = None) -> None:
        """Take the classes of the new picture; keep all else."""
        with self._holding():
            if self.stages is None:
                self._reset()
            elif self.gallery.chosen.tags:
                self._list_words(self.gallery.chosen.tags)
        self._refresh()

    def _draw(self) -> list[str]:
        shown, chosen = self.gallery.chosen, self.settings()
        found = self.stages = self.pipeline.show(shown, chosen)
        number = chosen.words.index(self.shown.value)
        classes = self.pipeline.labels.classes
        table = panels.word_colours(chosen.words, classes)
        word, pixels = self.shown.value, shown.pixels
        tags = f"tags: {', '.join(shown.tags)}" if shown.tags else "no tags known"
        self.panels["picture"].show(panels.scaled(pixels), f"{shown.name}, {tags}")
        score = f"{word}: probability {found.probabilities[number]:.2g}"
        self.panels["cam"].show(panels.heat(found.cam[number].cpu().numpy(), pixels), score)
        part = found.boxes[number].float().mean()
        boxed = panels.boxes(pixels, found.boxes[number].cpu().numpy())
        self.panels["boxes"].show(boxed, f"{100 * part:.0f} % of the patches")
        self.panels["refined"].show(panels.heat(found.refined[number].cpu().numpy(), pixels))
        share = found.smooth[1 + number] / found.smooth.sum(dim=0)
        top = float(share.max())
        smooth = panels.heat((share / max(top, 1e-12)).cpu().numpy(), pixels)
        self.panels["par"].show(smooth, f"share of {word} among all maps, up to {top:.2f}")
        iou = self.pipeline.word_iou(shown, chosen, found.label)
        scored = ", ".join(f"{name} {value:.1f} %" for name, value in iou.items())
        label = panels.label_map(found.label.cpu().numpy(), table, pixels)
        self.panels["label"].show(label, f"IoU: {scored}" if scored else "no mask to judge it by")
        if shown.mask is None:
            self.panels["truth"].hide()
        else:
            truth = panels.label_map(shown.mask, colours(1 + len(classes)), pixels)
            self.panels["truth"].show(truth, "training never sees it")
        self.scores.value = panels.bars(self._listed(chosen, found))
        return self.pipeline.remarks(shown, chosen)

    @staticmethod
    def _listed(chosen: Settings, found: Stages) -> list[tuple[str, float, bool]]:
        """List all words, then the most probable background prompts."""
        names = (*chosen.words, *chosen.backgrounds)
        rows = list(zip(names, found.probabilities.tolist(), strict=True))
        words = [(name, value, True) for name, value in rows[: len(chosen.words)]]
        others = sorted(rows[len(chosen.words) :], key=lambda row: -row[1])
        left = max(0, LISTED - len(words))
        return [*words, *((name, value, False) for name, value in others[:left])]

    def footer(self) -> str:
        """List the probabilities, as the bars do."""
        if self.stages is None:
            return ""
        rows = self._listed(self.settings(), self.stages)
        return "probabilities: " + ", ".join(f"{name} {value:.2g}" for name, value, _ in rows)


class AffinityExplorer(PictureExplorer):
    """Shows which patches relate to a clicked one: by attention, the decoder and the RFM.

    Args:
        affinities: Of a pipeline, and of a decoder at several training steps.
        pictures: To choose from.
    """

    def __init__(self, affinities: Affinities, pictures: Sequence[Picture]) -> None:
        method = affinities.method
        super().__init__(
            {
                "patch": "patch",
                "head": "attention of the block",
                "mean": f"mean of the last {method.static_layers} blocks",
                "affinity": "affinity of the decoder",
                "product": "what the RFM makes of both",
                "transition": "transition matrix of the RFM",
            },
            affinities.pipeline,
            pictures,
        )
        self.affinities = affinities
        backbone = affinities.pipeline.backbone
        blocks = len(backbone.blocks)
        self.patch = GridPicture(width=320, label="patches of the picture: click, or arrow keys")
        self.block = _slider("block", 0, blocks - 1, blocks - 1)
        heads = backbone.blocks[0].attn.num_heads
        options = [("mean of all heads", MEAN), *((f"head {n}", n) for n in range(heads))]
        self.head = widgets.Dropdown(options=options, description="head", style=NAMED, layout=WIDE)
        steps = list(affinities.decoders)
        self.decoder = widgets.SelectionSlider(
            options=steps, value=steps[-1], description="decoder after", style=NAMED, layout=WIDE
        )
        self.bars = widgets.HTML()
        controls = widgets.VBox([self.block, self.head, self.decoder, self.bars])
        where = widgets.VBox([self.patch, self.panels["patch"].caption])
        top = widgets.HBox([where, controls], layout=ROW)
        shown = widgets.HBox([*self.panels.values()][1:], layout=ROW)
        self.children = [self.gallery, top, self.message, shown]
        self._follow(self.patch, self.block, self.head, self.decoder)
        self._choose()

    def _choose(self, _change: object = None) -> None:
        """Show the new picture; choose its middle patch."""
        shown = self.gallery.chosen
        rows, columns = self.affinities.pipeline.features(shown).grid
        with self._holding():
            self.patch.show(panels.scaled(shown.pixels, 320), rows, columns)
            self.patch.cell = (rows // 2) * columns + columns // 2
        self._refresh()

    def _draw(self) -> list[str]:
        shown, patch = self.gallery.chosen, self.patch.cell
        head = None if self.head.value == MEAN else self.head.value
        chosen = {"block": self.block.value, "head": head, "decoder": self.decoder.value}
        rows = self.affinities.rows(shown, patch, **chosen)
        grid = tuple(rows.head.shape)
        cell = divmod(patch, grid[1])
        marked = panels.crosshair(shown.pixels, cell, grid)
        self.panels["patch"].show(marked, f"row {cell[0] + 1}, column {cell[1] + 1}")
        for name, values in vars(rows).items():
            others = values.flatten().clone()
            others[patch] = 0  # the patch itself would outshine the rest
            top, place = others.max(dim=0)
            spread = (values / top.clamp(min=1e-12)).clamp(max=1).cpu().numpy()
            y, x = divmod(int(place), grid[1])
            picture = panels.heat(spread, shown.pixels, smooth=False)
            picture = panels.crosshair(picture, cell, grid)
            equal = int((others == top).sum())
            where = f"row {y + 1}, column {x + 1}" if equal == 1 else f"{equal} patches"
            text = f"strongest: {float(top):.3g}, at {where}"
            self.panels[name].show(picture, text)
        choice = self.affinities.choice(shown, self.decoder.value)
        listed = [
            (f"block {block}{' ✓' if taken else ''}", value, taken)
            for block, value, taken in zip(
                choice.blocks, choice.difference, choice.selected, strict=True
            )
        ]
        limit = 1.1 * max(choice.difference)
        self.bars.value = (
            "<b>how far each block's attention is from the decoder's affinity</b>"
            f"{panels.bars(listed, limit=limit, mark=choice.limit)}"
            "the RFM takes those at or below the dashed line, their mean"
        )
        return []

    def footer(self) -> str:
        """Describe the RFM's choice, as the bars do."""
        choice = self.affinities.choice(self.gallery.chosen, self.decoder.value)
        rows = zip(choice.blocks, choice.difference, choice.selected, strict=True)
        mean = choice.limit
        listed = ", ".join(f"{b}: {d - mean:+.1e}{' ✓' if s else ''}" for b, d, s in rows)
        return (
            f"block {self.block.value}, {self.head.label}, decoder after {self.decoder.value}\n"
            f"difference to the affinity, mean {mean:.3f}, and each block beside it: {listed}"
        )
