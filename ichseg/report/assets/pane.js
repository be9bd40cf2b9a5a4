// One scan with its masks on a canvas: NiiVue, and above it the outlines of the masks.
// Axes are counted as NiiVue does: 0 to the right, 1 to the front, 2 up.
(function () {
  "use strict";

  // The colours of pictures.py, by label.
  const COLOURS = {
    prediction: [[230, 159, 0], [213, 94, 0], [240, 228, 66]],
    reference: [[86, 180, 233], [0, 158, 115], [0, 114, 178]],
  };
  // For the axial, coronal and sagittal plane: the axes across, up, and through it.
  const PLANES = [[0, 1, 2], [0, 2, 1], [1, 2, 0]];
  const LINE_PX = 2;
  const DASH_VOXELS = 4;
  const LETTER_PX = 8; // between a letter and the edge of its picture

  async function makePane(element) {
    const [canvas, above] = element.querySelectorAll("canvas");
    const { Niivue, DRAG_MODE, SHOW_RENDER } = window.niivue;
    const nv = new Niivue({
      backColor: [0, 0, 0, 1],
      crosshairColor: [1, 1, 1, 0.35],
      crosshairWidthUnit: "percent", // of the scan's width, whatever the size of its voxels
      doubleTouchTimeout: 0, // two taps and a long one would set a window of NiiVue's choice
      longTouchTimeout: 2 ** 31 - 1,
      dragMode: DRAG_MODE.pan,
      isColorbar: false,
      isNearestInterpolation: false,
      isOrientCube: false,
      isRadiologicalConvention: true,
      loadingText: "",
      logLevel: "error",
      measureLineColor: [1, 1, 1, 1],
      measureTextColor: [1, 1, 1, 1],
      multiplanarShowRender: SHOW_RENDER.ALWAYS,
      rulerColor: [1, 1, 1, 0.8],
      rulerWidth: 2,
      showAllOrientationMarkers: true,
    });
    await nv.attachToCanvas(canvas);
    for (const [name, colours] of Object.entries(COLOURS)) {
      const [R, G, B] = [0, 1, 2].map((part) => [0, ...colours.map((colour) => colour[part])]);
      nv.addColormap(name, { R, G, B, A: [0, 255, 255, 255], I: [0, 85, 170, 255] });
    }
    const letters = nv.drawSliceOrientationText.bind(nv);
    nv.drawSliceOrientationText = ([left, top, width, height], plane, beyond = [NaN, NaN]) => {
      const inset = LETTER_PX * nv.uiData.dpr;
      const inner = [left + inset, top + inset, width - 2 * inset, height - 2 * inset];
      letters(inner, plane, beyond.map((room) => room - inset));
    };
    const pane = { element, canvas, above, nv, masks: [], outlined: false, drawn: () => {} };
    const draw = nv.drawScene.bind(nv);
    nv.drawScene = () => {
      const drawn = draw();
      drawOutlines(pane);
      pane.drawn();
      return drawn;
    };
    return pane;
  }

  // Shows the volumes of a case instead of those before; the reference last, as its dashes lie on
  // what was found.
  async function fill(pane, volumes, [width, level]) {
    const { nv } = pane;
    const names = ["prediction", "reference"].filter((name) => name in volumes);
    const options = ["image", ...names].map((name) => ({
      base64: volumes[name],
      name: `${name}.nii.gz`,
      colormap: name === "image" ? "gray" : name,
      cal_min: name === "image" ? level - width / 2 : 0,
      cal_max: name === "image" ? level + width / 2 : 3,
      opacity: 1,
    }));
    const images = await Promise.all(options.map((option) => window.niivue.NVImage.loadFromBase64(option)));
    pane.masks = [];
    nv.clearMeasurements();
    while (nv.volumes.length) nv.removeVolume(nv.volumes[nv.volumes.length - 1]);
    images.forEach((image, i) => {
      const { colormap, cal_min, cal_max, opacity } = options[i];
      nv.addVolume(Object.assign(image, { colormap, cal_min, cal_max, opacity }));
    });
    pane.masks = names.map((name, i) => ({ name, image: images[i + 1], off: false }));
  }

  // Brings the picture to what is chosen: a window, a view, and how masks are drawn.
  function adjust(pane, { window: [width, level], view, outline, opacity, off }) {
    const { nv, element } = pane;
    const types = { axial: nv.sliceTypeAxial, planes: nv.sliceTypeMultiplanar, render: nv.sliceTypeRender };
    pane.outlined = outline && view !== "render";
    pane.opacity = opacity;
    Object.assign(nv.volumes[0], { cal_min: level - width / 2, cal_max: level + width / 2 });
    nv.volumes[0].opacity = view === "render" ? 0.25 : 1; // to see into the head
    for (const mask of pane.masks) {
      mask.off = off.has(mask.name);
      mask.image.opacity = mask.off || pane.outlined ? 0 : opacity;
    }
    nv.opts.multiplanarLayout = element.clientWidth > element.clientHeight ? 2 : 0; // grid, or what fits
    nv.opts.crosshairWidth = view === "axial" ? 0 : 0.6; // much thinner, a line may fall between pixels
    nv.setSliceType(types[view]);
    nv.updateGLVolume();
  }

  // ---- outlines ----

  function drawOutlines(pane) {
    const { nv, above, canvas } = pane;
    above.width = canvas.width; // clears it, too
    above.height = canvas.height;
    const pen = above.getContext("2d");
    pen.fillStyle = "rgb(0 0 0 / 1%)"; // of one pixel: Chromium may forget to clear where nothing is drawn
    pen.fillRect(0, 0, 1, 1);
    if (!pane.outlined) return;
    pen.lineWidth = LINE_PX * nv.uiData.dpr;
    pen.lineCap = "square";
    pen.globalAlpha = pane.opacity;
    nv.screenSlices.forEach((tile, index) => {
      if (!PLANES[tile.axCorSag]) return;
      for (const mask of pane.masks) if (!mask.off) drawOutline(pen, nv, tile, index, mask);
    });
  }

  // The edges of voxels between a label and what is beside it in a tile's slice. Of the reference
  // every other piece is left out, so that what was found shows beneath.
  function drawOutline(pen, nv, tile, index, { name, image }) {
    const [across, up, through] = PLANES[tile.axCorSag];
    const sizes = image.dimsRAS.slice(1, 4);
    const labelAt = labels(image);
    const place = [0, 0, 0];
    place[through] = Math.min(sizes[through] - 1, Math.max(0, Math.floor(nv.scene.crosshairPos[through] * sizes[through])));
    const label = (u, v) => {
      if (u < 0 || v < 0 || u >= sizes[across] || v >= sizes[up]) return 0;
      place[across] = u;
      place[up] = v;
      return labelAt(place);
    };
    const { rectangle: [left, top, width, height], x, y } = onScreen(nv, tile, index, across, up, sizes);
    const paths = COLOURS[name].map(() => new Path2D());
    const edge = (path, u1, v1, u2, v2) => {
      if (name === "reference" && Math.floor((2 * u1 + v1) / DASH_VOXELS) % 2) return;
      path.moveTo(x(u1), y(v1));
      path.lineTo(x(u2), y(v2));
    };
    for (let v = 0; v <= sizes[up]; v++) {
      for (let u = 0; u <= sizes[across]; u++) {
        const here = label(u, v), before = label(u - 1, v), below = label(u, v - 1);
        if (here !== before) edge(paths[(here || before) - 1], u, v, u, v + 1);
        if (here !== below) edge(paths[(here || below) - 1], u, v, u + 1, v);
      }
    }
    pen.save();
    pen.beginPath();
    pen.rect(left, top, width, height);
    pen.clip();
    paths.forEach((path, i) => {
      pen.strokeStyle = `rgb(${COLOURS[name][i]})`;
      pen.stroke(path);
    });
    pen.restore();
  }

  // A mask's label at [right, front, up]. The files' axes run to the left, to the back and up.
  function labels(image) {
    const [, width, height] = image.hdr.dims;
    return ([x, y, z]) => Math.min(3, image.img[(z * height + height - 1 - y) * width + width - 1 - x]);
  }

  // Where the edges of voxels lie in a tile, zoomed and moved as it is.
  function onScreen(nv, tile, index, across, up, sizes) {
    let [left, top, width, height] = tile.leftTopWidthHeight;
    if (width < 0) [left, width] = [left + width, -width]; // so are radiological ones told
    // from two points well within: beside a tile, be it by rounding alone, NiiVue gives no place
    const [firstX, firstY] = [left + width / 4, top + height / 4];
    const start = nv.screenXY2TextureFrac(firstX, firstY, index, false);
    const end = nv.screenXY2TextureFrac(firstX + width / 2, firstY + height / 2, index, false);
    const along = (axis, from, length) => (voxel) =>
      from + (voxel / sizes[axis] - start[axis]) / (end[axis] - start[axis]) * length;
    return { rectangle: [left, top, width, height], x: along(across, firstX, width / 2), y: along(up, firstY, height / 2) };
  }

  // Brings another pane to the same place, zoom and turn.
  function follow({ nv: from }, { nv: to }) {
    to.scene.crosshairPos = to.mm2frac(from.frac2mm(from.scene.crosshairPos).slice(0, 3));
    to.scene.pan2Dxyzmm = from.scene.pan2Dxyzmm.slice();
    to.scene.renderAzimuth = from.scene.renderAzimuth;
    to.scene.renderElevation = from.scene.renderElevation;
    to.scene.volScaleMultiplier = from.scene.volScaleMultiplier;
    to.drawScene();
  }

  // ---- places ----

  // What lies under a point of the screen: [right, front, up] as parts of the scan, mm in LPS, the
  // intensity, and the masks there; null beside the scan.
  function look(pane, event) {
    const { nv } = pane;
    const at = nv.volumes.length ? nv.canvasPos2frac(onCanvas(pane, event)) : [-1];
    if (at[0] < 0) return null;
    const [x, y, z] = nv.frac2mm(at);
    const voxel = nv.frac2vox(at);
    return {
      at,
      mm: [-x, -y, z],
      value: nv.volumes[0].getValue(...voxel),
      masks: pane.masks.filter(({ image }) => image.getValue(...voxel) > 0).map(({ name }) => name),
    };
  }

  function onCanvas({ canvas, nv }, event) {
    const box = canvas.getBoundingClientRect();
    return [(event.clientX - box.left) * nv.uiData.dpr, (event.clientY - box.top) * nv.uiData.dpr];
  }

  // Where a position in mm, LPS, lies in the scan.
  const fromMm = ({ nv }, [x, y, z]) => Array.from(nv.mm2frac([-x, -y, z]));

  // The middle of the first mask that there is in a slice, else of the slice.
  function middleOf(pane, slice) {
    for (const { image } of [...pane.masks].reverse()) {
      const [, width, height] = image.dimsRAS;
      const labelAt = labels(image);
      let count = 0, sumX = 0, sumY = 0;
      for (let y = 0; y < height; y++) {
        for (let x = 0; x < width; x++) {
          if (labelAt([x, y, slice])) { count++; sumX += x + 0.5; sumY += y + 0.5; }
        }
      }
      if (count) return [sumX / count / width, sumY / count / height, 0.5];
    }
    return [0.5, 0.5, 0.5];
  }

  // ---- ruler ----

  // Draws a line between two points of one plane, with its length; the last one moves as long as
  // `moving` says so. Gives its length in mm, or null where there is no line.
  function measure(pane, from, to, moving) {
    const { nv } = pane;
    const [start, end] = [from, to].map((event) => onCanvas(pane, event));
    const tile = nv.tileIndex(...start);
    const plane = tile < 0 ? undefined : PLANES[nv.screenSlices[tile].axCorSag];
    const lines = nv.document.completedMeasurements;
    if (moving) lines.pop();
    const places = [start, end].map((point) => nv.canvasPos2frac(point));
    if (!plane || tile !== nv.tileIndex(...end) || places.some((place) => place[0] < 0)) {
      nv.drawScene();
      return null;
    }
    const [startMM, endMM] = places.map((place) => nv.frac2mm(place).slice(0, 3));
    const distance = Math.hypot(...[0, 1, 2].map((axis) => endMM[axis] - startMM[axis]));
    lines.push({
      startMM,
      endMM,
      distance,
      sliceIndex: tile,
      sliceType: nv.screenSlices[tile].axCorSag,
      slicePosition: nv.scene.crosshairPos[plane[2]],
    });
    nv.drawScene();
    return distance;
  }

  // What is seen, as a picture.
  function picture(panes) {
    const whole = document.createElement("canvas");
    whole.width = panes.reduce((width, { canvas }) => width + canvas.width, 0);
    whole.height = Math.max(...panes.map(({ canvas }) => canvas.height));
    const pen = whole.getContext("2d");
    let left = 0;
    for (const { nv, canvas, above } of panes) {
      nv.drawScene(); // its pixels last only until the browser shows them
      pen.drawImage(canvas, left, 0);
      pen.drawImage(above, left, 0);
      left += canvas.width;
    }
    return new Promise((done) => { whole.toBlob(done, "image/png"); });
  }

  window.ichsegPane = { makePane, fill, adjust, follow, look, fromMm, middleOf, measure, picture };
}());
