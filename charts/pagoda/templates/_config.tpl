{{/* The model, the file of settings, and the times that follow from them. */}}

{{/* Where the checkpoint comes from: demo, hub, claim, image, storageInitializer or initContainer. */}}
{{- define "pagoda.modelSource" -}}
{{- $given := list -}}
{{- if .Values.model.hubId -}}{{- $given = append $given "hub" -}}{{- end -}}
{{- if .Values.model.claim.name -}}{{- $given = append $given "claim" -}}{{- end -}}
{{- if .Values.model.initContainer.image -}}{{- $given = append $given "initContainer" -}}{{- end -}}
{{- with .Values.model.uri -}}
{{- $scheme := splitList "://" . | first -}}
{{- $given = append $given (get (dict "hf" "hub" "pvc" "claim" "oci" "image") $scheme | default "storageInitializer") -}}
{{- end -}}
{{- if gt (len $given) 1 -}}
{{- fail "model: give one of model.uri, model.hubId, model.claim.name and model.initContainer.image, not several" -}}
{{- end -}}
{{- first (append $given "demo") -}}
{{- end -}}

{{/* What stands behind the scheme of model.uri. */}}
{{- define "pagoda.modelPath" -}}
{{- splitList "://" .Values.model.uri | rest | join "://" | trimSuffix "/" -}}
{{- end -}}

{{/* The Hugging Face id, however it was given. */}}
{{- define "pagoda.hubId" -}}
{{- if hasPrefix "hf://" .Values.model.uri -}}
{{- include "pagoda.modelPath" . | splitList ":" | first -}}
{{- else -}}
{{- .Values.model.hubId -}}
{{- end -}}
{{- end -}}

{{/* Branch, tag or commit: model.revision, or what stands behind a colon in hf://owner/name:revision, as KServe writes it. */}}
{{- define "pagoda.revision" -}}
{{- if .Values.model.revision -}}
{{- .Values.model.revision -}}
{{- else if hasPrefix "hf://" .Values.model.uri -}}
{{- include "pagoda.modelPath" . | splitList ":" | rest | join ":" -}}
{{- end -}}
{{- end -}}

{{/* Name and path of the claim with the checkpoint, however they were given; empty where there is none. */}}
{{- define "pagoda.modelClaim" -}}
{{- if hasPrefix "pvc://" .Values.model.uri -}}
{{- $parts := include "pagoda.modelPath" . | splitList "/" -}}
{{- dict "name" (first $parts) "path" (rest $parts | join "/") | toYaml -}}
{{- else if .Values.model.claim.name -}}
{{- toYaml .Values.model.claim -}}
{{- end -}}
{{- end -}}

{{/* The volume with the checkpoint; empty where there is none. */}}
{{- define "pagoda.modelVolume" -}}
{{- $source := include "pagoda.modelSource" . -}}
{{- if eq $source "claim" -}}
persistentVolumeClaim:
  claimName: {{ (include "pagoda.modelClaim" . | fromYaml).name }}
  readOnly: true
{{- else if eq $source "image" -}}
image:
  reference: {{ include "pagoda.modelPath" . }}
  pullPolicy: {{ .Values.image.pullPolicy }}
{{- else if eq $source "storageInitializer" -}}
emptyDir:
  sizeLimit: {{ .Values.model.storageInitializer.sizeLimit }}
{{- else if eq $source "initContainer" -}}
emptyDir:
  sizeLimit: {{ .Values.model.initContainer.sizeLimit }}
{{- end -}}
{{- end -}}

{{/* Whether several models are served, by engine.models or engine.model_dir_root; empty where not. */}}
{{- define "pagoda.severalModels" -}}
{{- if or .Values.engine.models .Values.engine.model_dir_root -}}
{{- if eq (include "pagoda.modelSource" .) "hub" -}}
{{- fail "model.hubId, or hf:// in model.uri: with several models each names its own in engine.models" -}}
{{- end -}}
{{- if eq .Values.mode "multiNode" -}}
{{- fail "mode multiNode serves one model: engine.models and engine.model_dir_root need mode single" -}}
{{- end -}}
true
{{- end -}}
{{- end -}}

{{- define "pagoda.modelName" -}}
{{- if .Values.model.name -}}
{{- .Values.model.name -}}
{{- else if .Values.engine.models -}}
{{- keys .Values.engine.models | sortAlpha | first -}}
{{- else if eq (include "pagoda.modelSource" .) "demo" -}}
demo
{{- else -}}
{{- include "pagoda.hubId" . | base | trimPrefix "." | default (include "pagoda.fullname" .) -}}
{{- end -}}
{{- end -}}

{{/* The file for `pagoda serve --config`. JSON, because Helm's YAML may write large integers as floats. */}}
{{/* The ConfigMap that lists adapters; empty where there is none. */}}
{{- define "pagoda.loraConfigMap" -}}
{{- if .Values.lora.enabled -}}
{{- if .Values.lora.configMap -}}
{{- .Values.lora.configMap -}}
{{- else if .Values.lora.adapters -}}
{{- include "pagoda.fullname" . }}-lora
{{- end -}}
{{- end -}}
{{- end -}}

{{- define "pagoda.configFile" -}}
{{- $source := include "pagoda.modelSource" . -}}
{{- $several := include "pagoda.severalModels" . -}}
{{- $own := dict
  "model_name" (include "pagoda.modelName" .)
  "host" "0.0.0.0"
  "http_port" .Values.network.httpPort
  "grpc_port" .Values.network.grpcPort -}}
{{- if .Values.lora.enabled -}}
{{- $_ := set $own "enable_lora" true -}}
{{- if include "pagoda.loraConfigMap" . -}}
{{- $_ := set $own "lora_dir" "/etc/pagoda-lora" -}}
{{- else if .Values.lora.claim.name -}}
{{- $_ := set $own "lora_dir" "/adapters" -}}
{{- end -}}
{{- end -}}
{{- if eq $source "hub" -}}
{{- $_ := set $own "model" (include "pagoda.hubId" .) -}}
{{- with include "pagoda.revision" . -}}
{{- $_ := set $own "revision" . -}}
{{- end -}}
{{- else if and (ne $source "demo") (not $several) -}}
{{- $_ := set $own "model" "/models" -}}
{{- end -}}
{{- if .Values.network.tls.secretName -}}
{{- $_ := set $own "ssl_certfile" "/etc/pagoda-tls/tls.crt" -}}
{{- $_ := set $own "ssl_keyfile" "/etc/pagoda-tls/tls.key" -}}
{{- end -}}
{{- with .Values.security.apiKeysSecret -}}
{{- if .name -}}
{{- $_ := set $own "api_keys_file" (printf "/etc/pagoda-keys/%s" .key | trimSuffix "/") -}}
{{- end -}}
{{- end -}}
{{- if and (include "pagoda.gpus" . | int) (not .Values.engine.device) -}}
{{- $_ := set $own "device" "cuda" -}}
{{- end -}}
{{- if eq .Values.mode "multiNode" -}}
{{- $_ := set $own "distributed_executor_backend" "ray" -}}
{{- $_ := set $own "ray_first_port" .Values.multiNode.ray.firstPort -}}
{{- if not (include "pagoda.gpus" . | int) -}}
{{- $_ := set $own "ray_num_cpus" (include "pagoda.cpuRanks" . | int) -}}
{{- end -}}
{{- /* Workers may have an image to pull first. */ -}}
{{- $_ := set $own "rendezvous_timeout_seconds" (include "pagoda.rendezvousTimeoutSeconds" . | float64) -}}
{{- end -}}
{{- merge $own .Values.engine | toPrettyJson -}}
{{- end -}}

{{/* Ranks of a pod without GPUs: those of one stage. */}}
{{- define "pagoda.cpuRanks" -}}
{{- .Values.engine.tensor_parallel_size | default 1 -}}
{{- end -}}

{{/* Longer than the setting's own default, for workers may have an image to pull first. */}}
{{- define "pagoda.rendezvousTimeoutSeconds" -}}
{{- .Values.engine.rendezvous_timeout_seconds | default .Values.engine.engine_start_timeout_seconds -}}
{{- end -}}

{{- define "pagoda.metricsPrefix" -}}
{{- .Values.engine.metrics_prefix | default "pagoda_" -}}
{{- end -}}

{{/* The labels that Prometheus puts on this release's series, whether scraped by Service or by pod. */}}
{{- define "pagoda.seriesSelector" -}}
{{- printf `namespace="%s",pod=~"%s-[a-z0-9]+-[a-z0-9]+"` .Release.Namespace (include "pagoda.fullname" .) -}}
{{- end -}}

{{/* Seconds a pod may take to end: still serving, then draining, then closing. */}}
{{- define "pagoda.terminationGracePeriodSeconds" -}}
{{- add (int .Values.rollout.preStopSeconds) (int (ceil .Values.engine.grace_period_seconds)) 10 -}}
{{- end -}}

{{/* Startup probes that may fail. The engine's own limit comes first: then the log ends with the reason. */}}
{{- define "pagoda.startupFailureThreshold" -}}
{{- $seconds := addf .Values.engine.engine_start_timeout_seconds 60 -}}
{{- int (ceil (divf $seconds .Values.probes.startup.periodSeconds)) -}}
{{- end -}}
