"""Where the references of a collection come from, as its manifest says it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ovref import config
from ovref.identity import canonical, spec_identity
from ovref.locations import with_absolute_models
from ovref.reduce.spec import ReduceSpec
from ovref.stages.embed import Embed
from ovref_inference.collection import format as fmt


@dataclass(frozen=True, kw_only=True)
class MadeFrom:
    """What made references, of what, and under which licences."""

    visual: fmt.EncoderInfo
    """Its `dim` does not count; it is known from the references."""
    textual: fmt.EncoderInfo
    templates: tuple[str, ...]
    weights: tuple[float, float]
    embed: dict[str, Any]
    """Identity of the stage that made them."""
    licences: tuple[str, ...]
    """Licences stated for the inputs; those of `provenance` come in addition."""
    provenance: tuple[dict[str, Any], ...]
    """As in a manifest's `build`, an entry for each build."""

    def licences_with(self, base: fmt.Heading | None) -> list[str]:
        """The stated licences, behind those of the collection that is grown."""
        return list(dict.fromkeys([*(base.licences if base else ()), *self.licences]))

    def provenance_with(self, base: fmt.Heading | None) -> list[dict[str, Any]]:
        """The provenance of the references of the collection that is grown, then that of these."""
        before = [] if base is None else provenance_of(base)
        return [*before, *(one for one in self.provenance if one not in before)]

    def heading(
        self, spec: ReduceSpec, licences: Sequence[str], dim_visual: int, dim_textual: int
    ) -> dict[str, Any]:
        """Fields of the manifest of a collection that is made of the references.

        Args:
            licences: `licences_with` the collection that is grown.
        """
        implied = [name for one in self.provenance for name in one.get("licences", ())]
        return {
            "visual": replace(self.visual, dim=dim_visual),
            "textual": replace(self.textual, dim=dim_textual),
            "templates": self.templates,
            "weights": self.weights,
            "prototypes": config.dump(spec.prototypes),
            "embeddings": spec.embeddings,
            "textual_embeddings": spec.textual_embeddings,
            "licences": tuple(dict.fromkeys([*licences, *implied])),
        }


def made_by(
    embed: Embed, licences: Sequence[str], provenance: Mapping[str, Any] | None
) -> MadeFrom:
    """For references that the stage `embed` has made."""
    placed = with_absolute_models(embed)  # whoever opens the collection is elsewhere
    visual, textual = (
        fmt.EncoderInfo(model=one.model, revision=one.revision, dim=0, settings=canonical(one))
        for one in (placed.visual, placed.text)
    )
    return MadeFrom(
        visual=visual,
        textual=textual,
        templates=tuple(embed.templates),
        weights=(embed.weights[0], embed.weights[1]),
        embed=spec_identity(embed),
        licences=tuple(licences),
        provenance=(dict(provenance or {}),),
    )


def of_collection(manifest: fmt.Manifest) -> MadeFrom:
    """For the references of a collection."""
    return MadeFrom(
        visual=manifest.visual,
        textual=manifest.textual,
        templates=manifest.templates,
        weights=manifest.weights,
        embed=manifest.build.get("embed", {}),
        licences=manifest.licences,
        provenance=tuple(provenance_of(manifest)),
    )


def provenance_of(manifest: fmt.Heading) -> list[dict[str, Any]]:
    """What a manifest says; without provenance it counts as one entry with its fingerprint."""
    return manifest.build.get("provenance") or [{"unknown": manifest.fingerprint}]
