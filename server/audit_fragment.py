"""The audit as a section of the report: a sentence, bounds beside the claim, figures, and what was not tried.

The figures are part of the page and take its colours.
"""

from __future__ import annotations

from pathlib import Path

from jinja2 import Environment, StrictUndefined

from medfed.errors import CheckpointError
from server.audit_result import ATTACKS, AuditResult, Membership, read_audit

FIGURES = {
    "audit-bounds.svg": "Lower bounds on epsilon (dots) beside what is claimed at the same delta (bars).",
    "audit-inversion.svg": "One training image, and what an attacker makes of an update of a first layer that was "
    "computed from it alone; see the notes.",
    "audit-adapter-inversion.svg": "The same image, and where searches for it behind an update of the study's own "
    "adapter ended. Closer to the original than the mean of the others would be something found.",
}
"""Files in the run's ``figures`` folder, with captions."""

_TEMPLATE = """<section id="audit">
<h2>Audit of the promise</h2>
<p{% if audit.refuted %} class="privacy" role="alert"{% endif %}>{{ audit.sentence }}</p>
{% if audit.bounds %}
<div class="wide"><table>
<caption>Site {{ audit.site }}; all bounds together hold with a confidence of
{{ "%.0f" | format(100 * audit.confidence) }} %.</caption>
<thead><tr><th scope="col">attack</th><th scope="col" class="number">delta</th>
<th scope="col" class="number">claimed epsilon</th><th scope="col" class="number">lower bound</th>
<th scope="col" class="number">guessed right</th></tr></thead>
<tbody>
{% for bound in audit.bounds %}
<tr><th scope="row">{{ attacks[bound.attack] }}</th><td class="number">{{ "%g" | format(bound.delta) }}</td>
<td class="number">{{ "none" if bound.claimed is none else "%.2f" | format(bound.claimed) }}</td>
<td class="number">{% if bound.exceeds %}<b>{{ "%.2f" | format(bound.epsilon) }}, above it</b>{% else %}
{{- "%.2f" | format(bound.epsilon) }}{% endif %}</td>
<td class="number">{{ bound.num_correct }} of {{ bound.num_guessed }}</td></tr>
{% endfor %}
</tbody></table></div>
{% endif %}
{% if attacked %}
<div class="wide"><table>
<caption>Who was in the training, told from an adapter, with 95 % intervals; an area of 0.5 is guessing.
{%- if audit.shadows %} The {{ audit.shadows.num_shadows }} shadow adapters of site {{ audit.site }} alone were each
trained on {{ audit.shadows.num_trained }} of its {{ audit.shadows.num_patients }} patients, and are attacked by each
other.{% endif %}</caption>
<thead><tr><th scope="col">adapter</th><th scope="col">told by</th>
<th scope="col" class="number">area under ROC</th>
{% for hit in attacked[0][1][0].hits %}
<th scope="col" class="number">found at {{ "%g" | format(100 * hit.false_alarm_rate) }} % false alarms</th>
{% endfor %}</tr></thead>
{% for adapter, attacks in attacked %}
<tbody>
{% for one in attacks %}
<tr>{% if loop.first %}<th scope="rowgroup" rowspan="{{ attacks | length }}">{{ adapter }}</th>{% endif %}
<td>{{ membership[one.attack] }}</td>
<td class="number">{{ "%.2f (%.2f to %.2f)" | format(one.auroc, one.low, one.high) }}</td>
{% for hit in one.hits %}
<td class="number">{{ "%.1f %% (%.1f to %.1f)" | format(100 * hit.share, 100 * hit.low, 100 * hit.high) }}</td>
{% endfor %}</tr>
{% endfor %}
</tbody>
{% endfor %}
</table></div>
{% endif %}
{% if audit.adapter_inversion %}
<div class="wide"><table>
<caption>An image searched behind one update of the study's own adapter, {{ audit.adapter_inversion.steps }} steps. The
mean of the other images, which says nothing of this patient, has SSIM
{{ "%.2f" | format(audit.adapter_inversion.mean_ssim) }} and PSNR
{{ "%.1f" | format(audit.adapter_inversion.mean_psnr_db) }} dB. Match: cosine of the found image's gradient and the
update. Place: of the original among the site's training images, by how close they are to what was found.</caption>
<thead><tr><th scope="col">update</th><th scope="col">search from</th><th scope="col" class="number">match</th>
<th scope="col" class="number">PSNR, dB</th><th scope="col" class="number">SSIM</th>
<th scope="col" class="number">place</th></tr></thead>
<tbody>
{% for one in audit.adapter_inversion.searches %}
<tr><th scope="row">{{ "no protection" if one.protection == "off" else one.protection }}</th><td>{{ one.start }}</td>
<td class="number">{{ "%.2f" | format(one.cosine) }}</td><td class="number">{{ "%.1f" | format(one.psnr_db) }}</td>
<td class="number">{{ "%.2f" | format(one.ssim) }}</td>
<td class="number">{{ one.rank }} of {{ audit.adapter_inversion.num_images }}</td></tr>
{% endfor %}
</tbody></table></div>
{% endif %}
{% for figure, caption in figures %}
<figure>{{ figure | safe }}<figcaption>{{ caption }}</figcaption></figure>
{% endfor %}
<ul class="soft">{% for note in audit.notes %}<li>{{ note }}</li>{% endfor %}</ul>
</section>
"""

MEMBERSHIP = {
    "loss": "low loss",
    "calibrated": "loss that fell since before training",
    "likelihood-ratio": "likelihood ratio of shadows",
}
"""Each membership attack in words."""


def audit_fragment(folder: Path) -> str:
    """The section of a run's audit as HTML for the report's page; empty if the run was not audited.

    Args:
        folder: of the run; ``audit.json``, and ``figures/audit-*.svg`` as far as they are there.

    Raises:
        CheckpointError: if the audit is damaged, or a figure is not a drawing.
    """
    audit = read_audit(folder)
    if audit is None:
        return ""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(_TEMPLATE).render(
        audit=audit,
        attacks=ATTACKS,
        membership=MEMBERSHIP,
        attacked=_attacked(audit),
        figures=list(_figures(folder / "figures")),
    )


def _attacked(audit: AuditResult) -> list[tuple[str, tuple[Membership, ...]]]:
    """What membership was inferred from, in words, with each attack."""
    found = []
    if audit.membership:
        first = audit.membership[0]
        patients = f"{first.num_members} training and {first.num_others} held-out patients of all sites"
        found.append((f"released, {patients}", audit.membership))
    if audit.shadows is not None:
        first = audit.shadows.released[0]
        patients = f"{first.num_members} training and {first.num_others} other patients of {audit.site}"
        found += [(f"released, {patients}", audit.shadows.released), ("shadows", audit.shadows.alone)]
    return found


def _figures(folder: Path) -> list[tuple[str, str]]:
    drawn = []
    for name, caption in FIGURES.items():
        if not (folder / name).is_file():
            continue
        text = (folder / name).read_text("utf-8")
        if not text.startswith("<svg") or "<script" in text:
            raise CheckpointError(f"Expected a drawing at {folder / name}, got something else; run medfed audit again.")
        drawn.append((text, caption))
    return drawn
