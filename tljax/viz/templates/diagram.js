(() => {
  function start(root, data) {
    const part = (name) => root.querySelector(`[data-part="${name}"]`);
    const lines = [...part("lines").children];
    const boxes = [...part("boxes").children];
    const svg = part("lines").ownerSVGElement;

    function show(text, isChosen) {
      part("readout").textContent = text;
      svg.classList.toggle("asked", text !== "");
      const near = new Set();
      lines.forEach((line, n) => {
        const chosen = isChosen(data.lines[n], n);
        line.classList.toggle("chosen", chosen);
        line.classList.toggle("faint", !chosen);
        if (chosen) near.add(data.lines[n].start).add(data.lines[n].end);
      });
      boxes.forEach((box, n) => box.classList.toggle("faint", !near.has(n)));
    }

    const nothing = () => show("", () => false);
    lines.forEach((line, n) => {
      line.onmouseenter = () => show(data.lines[n].about, (_, other) => other === n);
      line.onmouseleave = nothing;
    });
    boxes.forEach((box, n) => {
      box.onmouseenter = () => show(data.boxes[n], (line) => line.start === n || line.end === n);
      box.onmouseleave = nothing;
    });
  }

  for (const root of document.querySelectorAll(".tljax-diagram:not([data-ready])")) {
    root.dataset.ready = "yes";
    start(root, JSON.parse(root.querySelector("script[type='application/json']").textContent));
  }
})();
