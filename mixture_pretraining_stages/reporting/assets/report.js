"use strict";
(() => {
  const figures = JSON.parse(document.getElementById("figures").textContent);
  const plots = {};
  const config = {
    responsive: true,
    displaylogo: false,
    modeBarButtonsToRemove: ["lasso2d", "select2d", "autoScale2d"],
  };
  for (const [key, figure] of Object.entries(figures)) {
    plots[key] = document.getElementById("plot-" + key);
    // Bars need no zoom, and its buttons would cover their legend.
    const displayModeBar = figure.layout.barmode ? false : "hover";
    Plotly.newPlot(plots[key], figure.data, figure.layout, { ...config, displayModeBar });
  }

  function show(name, visible) {
    for (const [key, figure] of Object.entries(figures)) {
      const traces = figure.data.flatMap((trace, i) => (trace.meta === name ? [i] : []));
      if (traces.length) Plotly.restyle(plots[key], { visible }, traces);
    }
  }

  const buttons = [...document.querySelectorAll(".legend button[data-arm]")];
  function press(button, visible) {
    if ((button.getAttribute("aria-pressed") === "true") === visible) return;
    button.setAttribute("aria-pressed", String(visible));
    show(button.dataset.arm, visible);
  }
  for (const button of buttons) {
    button.addEventListener("click", () => {
      press(button, button.getAttribute("aria-pressed") !== "true");
    });
  }
  for (const all of document.querySelectorAll(".legend button[data-all]")) {
    all.addEventListener("click", () => {
      for (const button of buttons) press(button, all.dataset.all === "true");
    });
  }
})();
