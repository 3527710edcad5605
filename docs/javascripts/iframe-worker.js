// Search from a folder: browsers start no worker for a page opened as a file, so there a hidden frame takes its place.
// Named as the site's builder asks: with a script of this name, it loads none from another host.
(function () {
  "use strict";
  if (location.protocol !== "file:") return;
  window.Worker = class {
    constructor(url) {
      this.frame = document.createElement("iframe");
      this.frame.hidden = true;
      document.body.append(this.frame);
      this.inside = this.frame.contentWindow;
      this.inside.document.open();
      this.inside.document.write("<body></body>");
      this.inside.document.close();
      this.inside.postMessage = (data) => setTimeout(() => this.onmessage?.({ data: structuredClone(data) }));
      this.started = new Promise((done, failed) => {
        const script = this.inside.document.createElement("script");
        Object.assign(script, { src: new URL(url, document.baseURI).href, onload: done, onerror: failed });
        this.inside.document.body.append(script);
      });
      this.started.catch((error) => this.onerror?.(error));
    }

    postMessage(data) {
      this.started.then(() => this.inside.onmessage?.({ data: structuredClone(data) }), () => {});
    }

    terminate() {
      this.frame.remove();
    }
  };
})();
