"use strict";
(async () => {
  const packed = document.getElementById("plotly").textContent;
  const bytes = Uint8Array.from(atob(packed), (letter) => letter.charCodeAt(0));
  const library = document.createElement("script");
  library.textContent = await new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"))).text();
  document.head.append(library);

  const tables = JSON.parse(document.getElementById("axes")?.textContent ?? "{}");
  const chosen = { axis: "step", smoothing: "medium" };
  // The value of another axis at a step, by linear interpolation.
  const onAxis = (spec, step) => {
    const table = tables[chosen.axis];
    if (!table || spec.x_title !== "step") return step;
    const [steps, values] = table;
    let high = steps.findIndex((one) => one >= step);
    if (high === -1) high = steps.length - 1;
    if (high === 0 || steps[high] === step) return values[high];
    const share = (step - steps[high - 1]) / (steps[high] - steps[high - 1]);
    return values[high - 1] + share * (values[high] - values[high - 1]);
  };
  const shown = (spec) => spec.series
    .filter((series) => !series.smoothing || series.smoothing === chosen.smoothing)
    .map((series) => ({
      ...series, x: series.x.map((step) => onAxis(spec, step)),
      // Without a mean before them the values of each step are not faint.
      faint: series.faint && chosen.smoothing !== "off",
    }));
  const color = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
  const charts = [...document.querySelectorAll(".plot")].map((element) => ({
    element, spec: JSON.parse(element.nextElementSibling.textContent), log: false, height: element.clientHeight,
  }));

  const named = (spec) => shown(spec).filter((series) => !series.faint).length > 1;
  const scattered = (spec) => spec.series.some((series) => series.points);

  const channels = (hex) => [1, 3, 5].map((at) => parseInt(hex.slice(at, at + 2), 16));
  const between = (low, high, share) => {
    const [a, b] = [channels(low), channels(high)];
    return `rgb(${a.map((value, i) => Math.round(value + share * (b[i] - value))).join(",")})`;
  };
  const shade = (series) => series.ramp === null
    ? color(`series-${series.color}`) : between(color("ramp-low"), color("ramp-high"), series.ramp);

  const band = (series) => {
    if (!series.band) return [];
    const [xLow, low, xHigh, high] = series.band;
    const edge = {
      type: "scatter", mode: "lines", line: { width: 0 }, hoverinfo: "skip", showlegend: false,
    };
    const [r, g, b] = channels(color(`series-${series.color}`));
    return [{ ...edge, x: xLow, y: low }, { ...edge, x: xHigh, y: high, fill: "tonexty", fillcolor: `rgba(${r},${g},${b},0.16)` }];
  };

  const traces = (spec) => {
    const drawn = shown(spec).flatMap((series) => [...band(series), {
      x: series.x, y: series.y, name: series.name, type: "scatter",
      mode: series.points ? "markers" : series.markers ? "lines+markers" : "lines",
      line: { color: shade(series), width: series.faint ? 1 : 2, dash: series.dashed ? "dash" : "solid" },
      marker: { size: series.points ? 5 : 6, color: shade(series) },
      opacity: series.faint ? 0.35 : series.points ? 0.8 : 1,
      hovertemplate: scattered(spec) ? `%{x:.4~g}, %{y:${spec.format}}` : `%{y:${spec.format}}`,
      showlegend: named(spec) && !series.unnamed,
    }]);
    if (spec.marks.length) drawn.push({
      x: spec.marks.map((mark) => onAxis(spec, mark.x)), y: spec.marks.map(() => 1), yaxis: "y2", type: "scatter", mode: "markers",
      marker: { symbol: "triangle-down", size: 9, color: spec.marks.map((mark) => color(mark.color)) },
      text: spec.marks.map((mark) => mark.text), hovertemplate: "%{text}<extra></extra>", showlegend: false,
      cliponaxis: false,
    });
    return drawn;
  };

  // Plotly would pad the range of x for markers, and so shift the charts against each other.
  const extent = (spec) => {
    const series = shown(spec);
    const low = Math.min(...series.map((one) => one.x[0]));
    const high = Math.max(...series.map((one) => one.x[one.x.length - 1]));
    if (low === high) return undefined;
    const ends = spec.log_x ? [Math.log10(low), Math.log10(high)] : [low, high];
    // Points at the ends want room; curves begin at the axis.
    const room = scattered(spec) ? 0.025 * (ends[1] - ends[0]) : 0;
    return [ends[0] - room, ends[1] + room];
  };

  // Ticks of small values as 4e-4, not with the SI prefix micro.
  const isSmall = (spec) => Math.max(...shown(spec).flatMap((series) => series.y)) < 1;

  const NARROW = 560;  // Pixels of a chart below which a legend over the curves would hide them.

  const layout = (spec, log, width) => {
    const wide = width > 640;
    const place = width < NARROW ? { x: 0, xanchor: "left", y: 1.04, yanchor: "bottom" } : { x: 1, xanchor: "right", y: 1, yanchor: "top" };
    const axis = {
      gridcolor: color("grid"), zeroline: false, linecolor: color("line"), tickfont: { size: 11.5 }, automargin: true,
    };
    return {
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", margin: { l: 8, r: 8, t: 14, b: 8 },
      font: { family: getComputedStyle(document.body).fontFamily, size: 12, color: color("quiet") },
      hovermode: scattered(spec) ? "closest" : "x unified", hoverlabel: { bgcolor: color("card"), bordercolor: color("line"), font: { color: color("text") } },
      showlegend: named(spec),
      legend: { orientation: "h", ...place, bgcolor: "rgba(0,0,0,0)", font: { color: color("text") } },
      xaxis: {
        ...axis, showgrid: false, title: { text: spec.x_title === "step" ? chosen.axis : spec.x_title, font: { size: 11.5 }, standoff: 6 },
        type: spec.log_x ? "log" : "linear", range: extent(spec), nticks: wide ? 9 : 5,
      },
      yaxis: { ...axis, type: log ? "log" : "linear", nticks: wide ? 7 : 5, tickformat: spec.tick_format, exponentformat: isSmall(spec) ? "e" : "B", rangemode: spec.from_zero ? "tozero" : "normal" },
      yaxis2: { overlaying: "y", range: [0, 1], visible: false, fixedrange: true },
      shapes: spec.marks.map((mark) => ({
        type: "line", x0: onAxis(spec, mark.x), x1: onAxis(spec, mark.x), yref: "paper", y0: 0, y1: 1,
        line: { color: color(mark.color), width: 1, dash: "dot" },
      })),
    };
  };

  const draw = (chart) => {
    const { element, spec } = chart;
    const entries = named(spec) ? shown(spec).filter((series) => !series.unnamed).length : 0;
    // A legend above takes its room from the curves, a line for each entry at worst.
    if (element.clientWidth < NARROW && entries > 2) element.style.height = `${chart.height + 18 * entries}px`;
    return Plotly.react(
      element, traces(spec), layout(spec, chart.log, element.clientWidth),
      { displaylogo: false, displayModeBar: false, responsive: true },
    );
  };
  for (const chart of charts) {
    chart.log = chart.spec.log_y;
    draw(chart);
    const buttons = [...chart.element.parentElement.querySelectorAll(".scale button")];
    for (const button of buttons) button.addEventListener("click", () => {
      chart.log = button.value === "log";
      for (const other of buttons) other.setAttribute("aria-pressed", String(other === button));
      draw(chart);
    });
  }
  for (const switched of ["axis", "smoothing"]) {
    const buttons = [...document.querySelectorAll(`.controls .${switched} button`)];
    for (const button of buttons) button.addEventListener("click", () => {
      chosen[switched] = button.value;
      for (const other of buttons) other.setAttribute("aria-pressed", String(other === button));
      charts.forEach(draw);
    });
  }
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => charts.forEach(draw));
})();
