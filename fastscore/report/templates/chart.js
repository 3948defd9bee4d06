"use strict";
// The words of a chart's marks, for the mouse and for the arrow keys. Charts and tables are there without this script.
for (const chart of document.querySelectorAll(".chart")) {
  const marks = () =>
    [...chart.querySelectorAll('[aria-roledescription="value"]')].filter((mark) => mark.getClientRects().length);
  const tip = document.createElement("div");
  tip.className = "tip";
  tip.setAttribute("role", "status");
  chart.after(tip);
  chart.tabIndex = 0;
  chart.setAttribute("aria-description", "The arrow keys walk through the values.");
  let shown = null;

  const hide = () => {
    shown?.classList.remove("shown");
    shown = null;
    tip.textContent = "";
    tip.classList.remove("shown");
  };

  const show = (mark) => {
    if (mark === shown) return;
    hide();
    shown = mark;
    mark.classList.add("shown");
    tip.textContent = mark.getAttribute("aria-label");
    tip.classList.add("shown");
    const frame = chart.parentElement.getBoundingClientRect();
    const at = mark.getBoundingClientRect();
    const middle = at.left + at.width / 2 - frame.left - tip.offsetWidth / 2;
    tip.style.left = `${Math.max(0, Math.min(middle, frame.width - tip.offsetWidth))}px`;
    tip.style.top = `${chart.offsetTop - 4}px`;
  };

  const step = (key) => {
    const all = marks();
    const at = all.indexOf(shown);
    const last = all.length - 1;
    const next = {
      ArrowRight: at + 1,
      ArrowDown: at + 1,
      ArrowLeft: at < 0 ? last : at - 1,
      ArrowUp: at < 0 ? last : at - 1,
      Home: 0,
      End: last,
    }[key];
    return next === undefined ? null : all[Math.max(0, Math.min(next, last))];
  };

  chart.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.altKey || event.metaKey) return;
    if (event.key === "Escape") hide();
    const mark = step(event.key);
    if (!mark) return;
    event.preventDefault();
    show(mark);
  });
  for (const type of ["pointermove", "pointerdown"]) {
    chart.addEventListener(type, (event) => {
      const mark = event.target.closest('[aria-roledescription="value"]');
      if (mark) show(mark);
    });
  }
  chart.addEventListener("pointerleave", hide);
  chart.addEventListener("blur", hide);
}

// On paper nothing unfolds.
const folded = [];
addEventListener("beforeprint", () => {
  for (const more of document.querySelectorAll("details.more:not([open])")) {
    more.open = true;
    folded.push(more);
  }
});
addEventListener("afterprint", () => {
  for (const more of folded.splice(0)) more.open = false;
});
