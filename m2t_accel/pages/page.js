"use strict";
const charts = JSON.parse(document.getElementById("charts").textContent);
const slider = document.getElementById("smoothing");
const narrow = window.innerWidth < 600;
const MUTED = "#656d76", LINE = "#e6e9ed";
let zoomed = false;

// The state of the controls outlives a reload. A browser may refuse storage to a local file.
function recall(name) { try { return sessionStorage.getItem(name); } catch { return null; } }
function remember(name, value) { try { sessionStorage.setItem(name, value); } catch { /* the default returns */ } }

// Mean over a centred window, which shrinks towards the ends so that the curve begins and ends at the right place.
function smooth(values, share) {
  const half = Math.round(share * values.length / 2), sums = [0];
  for (const value of values) sums.push(sums[sums.length - 1] + value);
  return values.map((_, i) => {
    const reach = Math.min(half, i, values.length - 1 - i);
    return (sums[i + reach + 1] - sums[i - reach]) / (2 * reach + 1);
  });
}

function traces(chart) {
  if (chart.heat) {
    return [{
      type: "heatmap", ...chart.heat, zmin: 0, colorscale: [[0, "#f5f8fc"], [0.5, "#5b93cf"], [1, "#0b2545"]],
      colorbar: { thickness: 10, outlinewidth: 0, tickfont: { size: 11 } },
      hovertemplate: "%{y}<br>epoch %{x:.4~g}: %{z:.4~g}<extra></extra>",
    }];
  }
  const share = Number(slider.value) / 100, drawn = [];
  for (const series of chart.series) {
    const { name, color, dash = "solid", width = 1.8, mode = "lines", opacity = 1 } = series;
    const smoothed = share > 0 && chart.smooth && series.y.length > 10;
    const common = { name, legendgroup: name, hovertemplate: `%{y:.5~g}${chart.unit || ""}` };
    if (series.low) {
      drawn.push({ x: series.x, y: series.low, mode: "lines", line: { width: 0 }, hoverinfo: "skip", showlegend: false });
      drawn.push({
        x: series.x, y: series.high, mode: "lines", line: { width: 0 }, hoverinfo: "skip", showlegend: false,
        fill: "tonexty", fillcolor: color + "30",
      });
    }
    drawn.push({
      ...common, name: smoothed ? `${name}, not smoothed` : name, x: series.x, y: series.y, mode, opacity: smoothed ? 0.25 * opacity : opacity,
      line: { color, dash, width: smoothed ? 1 : width }, marker: { color, size: 6 },
      showlegend: !smoothed && series.legend !== false,
    });
    if (smoothed) {
      drawn.push({
        ...common, x: series.mean_x || series.x, opacity, mode: "lines",
        y: smooth(series.mean_y || series.y, share), line: { color, dash, width }, showlegend: series.legend !== false,
      });
    }
  }
  return drawn;
}

function layout(chart) {
  const axis = {
    gridcolor: LINE, linecolor: LINE, zeroline: false, tickfont: { size: 11, color: MUTED },
  };
  const type = chart.heat ? "category" : chart.log ? "log" : "linear";
  const y = { ...axis, type, uirevision: String(chart.log), exponentformat: "power" };
  if (chart.range && !chart.log) y.range = chart.range;
  if (chart.unit) y.ticksuffix = chart.unit;
  if (chart.heat) y.automargin = true;  // slow, so only where labels are long
  if (chart.heat && narrow) y.showticklabels = false;
  return {
    margin: { l: 52, r: 8, t: narrow ? 10 : 28, b: 34 }, hovermode: chart.heat ? "closest" : "x unified",
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", uirevision: "keep",
    font: { family: getComputedStyle(document.body).fontFamily, size: 12, color: "#1f2328" },
    xaxis: {
      ...axis, title: { text: "epoch", font: { size: 11, color: MUTED }, standoff: 4 },
      unifiedhovertitle: { text: "epoch %{x:.4~g}" },
    },
    yaxis: y, dragmode: narrow ? false : "zoom",  // on a phone, dragging scrolls the page
    showlegend: !chart.heat && chart.legend !== false && chart.series.length > 1,
    modebar: { bgcolor: "rgba(255,255,255,0.8)", color: "#8c959f", activecolor: "#1f5fa8" },
    legend: { orientation: "h", x: 0, y: 1.02, yanchor: "bottom", font: { size: 11 } },
  };
}

function draw(chart) {
  const options = {
    responsive: true, displaylogo: false, displayModeBar: narrow ? false : "hover",
    modeBarButtons: [["zoom2d", "pan2d", "resetScale2d", "toImage"]],
  };
  return Plotly.react(chart.element, traces(chart), layout(chart), options);
}

async function start() {
  if (slider && recall("smoothing") !== null) slider.value = recall("smoothing");
  for (const chart of charts) {
    const card = document.getElementById(chart.id);
    chart.element = card.querySelector(".plot");
    const button = card.querySelector("button.log");
    if (button) {
      chart.log = (recall(`log ${chart.id}`) ?? String(Boolean(chart.log))) === "true";
      const show = () => button.setAttribute("aria-pressed", String(chart.log));
      show();
      button.addEventListener("click", () => {
        chart.log = !chart.log;
        remember(`log ${chart.id}`, chart.log);
        show();
        draw(chart);
      });
    }
  }
  if (slider) {
    const show = () => { slider.nextElementSibling.textContent = `${slider.value} %`; };
    show();
    let waiting = false;
    slider.addEventListener("input", () => {
      show();
      remember("smoothing", slider.value);
      if (waiting) return;
      waiting = true;
      setTimeout(() => { waiting = false; charts.filter((chart) => chart.smooth).forEach(draw); }, 30);
    });
  }
  for (const chart of charts) {
    await draw(chart);
    chart.element.on("plotly_relayout", (change) => {
      if (Object.keys(change).some((key) => key.includes("range["))) zoomed = true;
      if (Object.keys(change).some((key) => key.includes("autorange"))) zoomed = false;
    });
    await new Promise((resolve) => setTimeout(resolve));  // the page stays responsive, and shows each chart at once
  }
  document.documentElement.dataset.drawn = String(charts.length);
}

for (const element of document.querySelectorAll("time")) {
  const written = new Date(element.dateTime), minutes = Math.floor((Date.now() - written) / 60000);
  element.title = element.textContent;
  element.textContent = `${written.toLocaleString()}${minutes > 0 ? `, ${ago(minutes)} ago` : ""}`;
}
function ago(minutes) {
  if (minutes < 120) return `${minutes} min`;
  return minutes < 2880 ? `${Math.floor(minutes / 60)} h` : `${Math.floor(minutes / 1440)} days`;
}
// A page of a run under way reloads itself, but not under the eyes of somebody who has zoomed.
const every = Number(document.body.dataset.reload || 0);
if (every) setInterval(() => { if (!zoomed && !document.hidden) location.reload(); }, 1000 * every);
start();
