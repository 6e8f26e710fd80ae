// What the browser tests ask of a page; each is a function without side effects but `unfold` and `widen`.
globalThis.probe = (() => {
  const all = (selector, within = document) => [...within.querySelectorAll(selector)];
  const seen = (element) => element.checkVisibility();
  const start = (element) => element.outerHTML.slice(0, 80);

  const luminance = (rgb) => {
    const [r, g, b] = rgb.map((v) => ((v /= 255) <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const colour = (text) => text.match(/[\d.]+/g).map(Number);
  const background = (element) => {
    for (let at = element; at; at = at.parentElement) {
      const [r, g, b, alpha = 1] = colour(getComputedStyle(at).backgroundColor);
      if (alpha === 1) return [r, g, b];
    }
    return [255, 255, 255];
  };
  const contrast = (element) => {
    const both = [colour(getComputedStyle(element).color).slice(0, 3), background(element)].map(luminance);
    return (Math.max(...both) + 0.05) / (Math.min(...both) + 0.05);
  };

  return {
    unfold: () => all("details").forEach((folded) => { folded.open = true }),
    widen: () => {
      const wide = document.createElement("p");
      wide.textContent = "wide";
      wide.style.width = "500px";
      document.querySelector("main").append(wide);
    },
    imagesAreThere: () => [...document.images].every((image) => image.complete && image.naturalWidth > 0),
    // The width of the window and of what is in it, and elements that stick out of it but not of a box that scrolls.
    width: () => [innerWidth, document.documentElement.scrollWidth],
    tooWide: () => all("main *").filter((element) => {
      const box = element.closest(".scroll, pre");
      return element.getBoundingClientRect().right > document.documentElement.clientWidth + 0.5 && (!box || box === element);
    }).map(start),
    scrolled: () => all(".scroll").filter((box) => box.scrollWidth > box.clientWidth).length,
    smallestLabel: () => Math.min(...all("svg text").map((text) => text.getBoundingClientRect().height)),
    // The three texts that stand out least, as [ratio by WCAG 2, element].
    faintest: () => all("main *, .skip")
      .filter((element) => !element.closest("svg"))
      .filter((element) => [...element.childNodes].some((node) => node.nodeType === 3 && node.data.trim()))
      .map((element) => [contrast(element), start(element)])
      .sort((a, b) => a[0] - b[0]).slice(0, 3),
    // Texts and lines of figures that stand out least, as [ratio, element]; a grid is to be faint.
    faintestInFigures: () => all("svg text, svg [id*='line2d'] > path")
      .map((drawn) => {
        const look = getComputedStyle(drawn), ink = drawn.tagName === "text" ? look.fill : look.stroke;
        if (ink === "none" || drawn.getAttribute("style").includes("--grid")) return [21, ""];
        const both = [colour(ink).slice(0, 3), background(drawn.closest("svg").parentElement)].map(luminance);
        return [(Math.max(...both) + 0.05) / (Math.min(...both) + 0.05), start(drawn)];
      })
      .sort((a, b) => a[0] - b[0]).slice(0, 3),
    top: (selector) => document.querySelector(selector).getBoundingClientRect().top + scrollY,
    // Of each map which layer is in sight, as the browser laid it out.
    layersShown: () => all(".map").map((box) => {
      const over = box.querySelector(".over").getBoundingClientRect(), under = box.getBoundingClientRect();
      return (under.top - over.top) / under.height;
    }),
    wordsShown: () => all(".words").filter(seen).map((words) => words.textContent),
    popoversShown: () => all(":popover-open").map((open) => open.textContent.trim()),
    stops: () => all('a[href], summary, button, input:checked, input[type="range"], select, [tabindex="0"]').filter(seen).length,
    focus: () => {
      const at = document.activeElement, box = at.getBoundingClientRect(), look = getComputedStyle(at);
      return {
        what: `${at.tagName} ${at.className} ${at.name ?? ""} ${at.value ?? at.textContent.slice(0, 40)}`,
        value: at.value ?? "",
        outlined: at.matches(":focus-visible") && look.outlineStyle !== "none" && parseFloat(look.outlineWidth) >= 2,
        seen: seen(at) && box.bottom > 0 && box.top < innerHeight && box.right > 0 && box.left < innerWidth,
      };
    },
    // Of each table of answers its rows as [is it seen, outcomes, category].
    rows: () => all(".answers").map((box) =>
      all("tbody tr", box).map((row) => [seen(row), row.dataset.outcomes.split(","), row.dataset.category])),
    status: () => document.querySelector(".filter [role=status]").textContent,
    filtersSeen: () => all("form").filter(seen).length,
    headings: () => all("h1, h2, h3, summary").map((heading) => heading.textContent),
    figures: () => all("figure").map((figure) => ({
      height: figure.getBoundingClientRect().height,
      caption: figure.querySelector("figcaption").textContent,
      words: all("svg text", figure).flatMap((text) => text.textContent.split(/\s+/)).filter(Boolean),
    })),
  };
})();
