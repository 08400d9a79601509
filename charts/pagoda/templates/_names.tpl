{{/* Names and labels. */}}

{{- define "pagoda.name" -}}
{{- .Values.nameOverride | default .Chart.Name | trunc 40 | trimSuffix "-" -}}
{{- end -}}

{{/* Whole name of the objects: at most 40 characters, which leaves room for our own endings and what Kubernetes appends. */}}
{{- define "pagoda.fullname" -}}
{{- $name := include "pagoda.name" . -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 40 | trimSuffix "-" -}}
{{- else if contains $name .Release.Name -}}
{{- .Release.Name | trunc 40 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name $name | trunc 40 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}

{{/* The pods that are asked: those of the Deployment, or the heads. */}}
{{- define "pagoda.selectorLabels" -}}
app.kubernetes.io/name: {{ include "pagoda.name" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/component: server
{{- end -}}

{{/* The other pods of a group. */}}
{{- define "pagoda.workerLabels" -}}
{{- merge (dict "app.kubernetes.io/component" "worker") (include "pagoda.selectorLabels" . | fromYaml) | toYaml -}}
{{- end -}}

{{/* All of them, as a selector: what is not said of the pods of `helm test`. */}}
{{- define "pagoda.allPodLabels" -}}
{{- if eq .Values.mode "single" -}}
{{- include "pagoda.selectorLabels" . -}}
{{- else -}}
pagoda/ranks: {{ include "pagoda.fullname" . }}
{{- end -}}
{{- end -}}

{{/* Labels of pods: no versions, so that a new chart alone does not replace pods that took long to load. */}}
{{- define "pagoda.podLabels" -}}
{{- merge (include "pagoda.selectorLabels" . | fromYaml) (include "pagoda.allPodLabels" . | fromYaml) .Values.extraLabels | toYaml -}}
{{- end -}}

{{/* Labels of every object. The chart's own win over extraLabels: selectors must hold. */}}
{{- define "pagoda.labels" -}}
{{- $own := dict
  "app.kubernetes.io/version" (.Chart.AppVersion | toString)
  "app.kubernetes.io/managed-by" .Release.Service
  "helm.sh/chart" (printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_") -}}
{{- $own = merge (include "pagoda.selectorLabels" . | fromYaml) $own -}}
{{- merge $own .Values.extraLabels | toYaml -}}
{{- end -}}

{{- define "pagoda.cacheClaimName" -}}
{{- include "pagoda.fullname" . }}-cache
{{- end -}}

{{/* The Service's ports. */}}
{{- define "pagoda.servicePort" -}}
{{- int (.Values.network.service.httpPort | default .Values.network.httpPort) -}}
{{- end -}}

{{- define "pagoda.serviceAccountName" -}}
{{- if .Values.security.serviceAccount.create -}}
{{- .Values.security.serviceAccount.name | default (include "pagoda.fullname" .) -}}
{{- else -}}
{{- .Values.security.serviceAccount.name | default "default" -}}
{{- end -}}
{{- end -}}

{{- define "pagoda.image" -}}
{{- with .Values.image -}}
{{- if .digest -}}
{{- printf "%s@%s" .repository .digest -}}
{{- else -}}
{{- printf "%s:%s" .repository (.tag | default $.Chart.AppVersion) -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{/* `http` or `https`, as the server speaks it. */}}
{{- define "pagoda.scheme" -}}
{{- ternary "https" "http" (ne .Values.network.tls.secretName "") -}}
{{- end -}}

{{- define "pagoda.url" -}}
{{- printf "%s://%s:%d" (include "pagoda.scheme" .) (include "pagoda.fullname" .) (include "pagoda.servicePort" . | int) -}}
{{- end -}}

{{/* Names inside a release of mode multiNode. Call with the root context, or a list of it and the number of a group. */}}
{{- define "pagoda.headName" -}}
{{- include "pagoda.fullname" . }}-head
{{- end -}}

{{- define "pagoda.workerName" -}}
{{- include "pagoda.fullname" (index . 0) }}-worker-{{ index . 1 }}
{{- end -}}

{{- define "pagoda.ranksName" -}}
{{- include "pagoda.fullname" . }}-ranks
{{- end -}}

{{/* Where a group's workers find its head. */}}
{{- define "pagoda.headAddress" -}}
{{- $root := index . 0 -}}
{{- printf "%s-%d.%s" (include "pagoda.headName" $root) (int (index . 1)) (include "pagoda.ranksName" $root) -}}
{{- end -}}
