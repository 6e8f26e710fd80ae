"use strict";
// Rows of answers by what became of them; without this script all of them are listed.
for (const box of document.querySelectorAll(".answers")) {
  const form = box.querySelector("form");
  const rows = [...box.querySelectorAll("tbody tr")];
  const status = form.querySelector("[role=status]");
  const show = () => {
    const chosen = new FormData(form);
    const method = Number(chosen.get("method") ?? 0);
    const category = chosen.get("category") ?? "";
    const counts = {};
    let shown = 0;
    for (const row of rows) {
      const outcome = row.dataset.outcomes.split(",")[method];
      const fits = category === "" || row.dataset.category === category;
      if (fits) counts[outcome] = (counts[outcome] ?? 0) + 1;
      row.hidden = !fits || !["", outcome].includes(chosen.get("outcome"));
      if (!row.hidden) shown += 1;
    }
    counts[""] = Object.values(counts).reduce((sum, count) => sum + count, 0);
    for (const radio of form.querySelectorAll("input")) {
      radio.nextElementSibling.textContent = `${radio.value || "all"} ${counts[radio.value] ?? 0}`;
    }
    status.textContent = `${shown} of ${rows.length} rows shown`;
  };
  form.addEventListener("change", show);
  form.hidden = false;
  show();
}
// One slider moves the maps of all images to another layer; without this script those of one layer are shown.
for (const box of document.querySelectorAll(".maps")) {
  const form = box.querySelector("form");
  const show = () => {
    const layer = form.layer.valueAsNumber;
    box.style.setProperty("--layer", layer);
    form.querySelector("output").textContent = layer;
    for (const peak of box.querySelectorAll(".peak")) peak.textContent = peak.dataset.peaks.split(",")[layer];
    for (const image of box.querySelectorAll(".looked")) {
      image.querySelectorAll(".words").forEach((words, index) => { words.hidden = index !== layer });
    }
  };
  form.addEventListener("input", show);
  form.hidden = false;
}
