"use strict";
document.documentElement.classList.add("js");
for (const view of document.querySelectorAll(".view.pair")) {
  const slider = view.querySelector("input");
  slider.hidden = false;
  const show = () => {
    const at = Number(slider.value);
    view.style.setProperty("--at", at + "%");
    view.classList.toggle("at-start", at < 12);
    view.classList.toggle("at-end", at > 88);
    slider.setAttribute("aria-valuetext", at + "% before");
  };
  const move = (value) => { slider.value = value; show(); };
  const follow = (event) => {
    const box = view.getBoundingClientRect();
    move(Math.round(100 * (event.clientX - box.left) / box.width));
  };
  const flip = () => move(Number(slider.value) > 50 ? 0 : 100);
  view.addEventListener("pointerdown", (event) => {
    if (event.button !== 0) return;
    view.setPointerCapture(event.pointerId);
    slider.focus({ preventScroll: true });
    follow(event);
  });
  view.addEventListener("pointermove", (event) => {
    if (view.hasPointerCapture(event.pointerId)) follow(event);
  });
  // A mouse would take the focus from the slider, and select the captions.
  view.addEventListener("mousedown", (event) => event.preventDefault());
  view.addEventListener("dblclick", flip);
  slider.addEventListener("input", show);
  slider.addEventListener("keydown", (event) => {
    if (event.key === " ") { event.preventDefault(); flip(); }
  });
  show();
}
