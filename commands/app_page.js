// Links the player, the film strip and the slider of the moment that looks back.
() => {
  const player = () => document.querySelector("#player video");
  const setMoment = (seconds) => {
    const slider = document.querySelector("#second input[type=range]");
    if (!slider) return;
    const step = Number(slider.step) || 1;
    const value = Math.min(Math.floor(seconds / step + 1e-6) * step, Number(slider.max));
    if (Math.abs(Number(slider.value) - value) < step / 2) return;
    slider.value = value;
    slider.dispatchEvent(new Event("input", { bubbles: true }));
  };
  const follow = (event) => {
    if (event.target.closest("#player")) setMoment(event.target.currentTime);
  };
  document.addEventListener("timeupdate", follow, true); // media events do not bubble
  document.addEventListener("click", (event) => {
    const moment = event.target.closest(".strip .moment");
    if (!moment) return;
    const time = Number(moment.dataset.from);
    if (player()) player().currentTime = time + 0.01;
    setMoment(time);
  });
}
